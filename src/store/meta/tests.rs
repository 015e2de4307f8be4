use std::fmt::Debug;

use proptest::collection::{btree_map, vec};
use proptest::option::of;
use proptest::prelude::*;
use serde::de::DeserializeOwned;

use super::*;
use crate::hostile::{self, assert_format};
use crate::store::StoreOptions;

fn refs() -> impl Strategy<Value = VersionRef> + Clone {
    any::<(u64, u64)>().prop_map(|(volume, number)| VersionRef { volume, number })
}

fn volumes() -> impl Strategy<Value = Volume> + Clone {
    let numbers = any::<(u64, i64, i64, u64, u64)>();
    (numbers, ".{0,12}", vec(any::<(u64, u64)>(), 0..3)).prop_map(
        |((id, created, used, head, next), name, taken_back)| Volume {
            id,
            name,
            created,
            used,
            head,
            next,
            taken_back,
        },
    )
}

fn versions() -> impl Strategy<Value = Version> + Clone {
    let text = || ".{0,9}";
    let numbers = any::<(u64, u64, i64, u64, bool)>();
    let texts = (of(text()), btree_map(text(), text(), 0..3), of(text()));
    let excluded = (vec(text(), 0..3), 1_u64..);
    (numbers, any::<[u8; 32]>(), of(refs()), texts, of(excluded)).prop_map(
        |((volume, number, time, bytes, flag), root, base, (job, labels, message), excluded)| {
            Version {
                volume,
                number,
                root: NodeId(root),
                base,
                previous: number / 2,
                time,
                uid_map: job.clone(),
                job,
                labels,
                message,
                files: bytes / 3,
                logical_bytes: bytes,
                blocks: bytes / 512,
                new_bytes: bytes / 2,
                has_acl: flag,
                has_links: !flag,
                excluded: excluded
                    .map(|(paths, count)| LeftOut { paths, count })
                    .unwrap_or_default(),
            }
        },
    )
}

fn forks() -> impl Strategy<Value = Fork> + Clone {
    let text = || ".{0,9}";
    let numbers = any::<(u64, u64, i64, u32, u32)>();
    let options = (
        btree_map(text(), text(), 0..3),
        vec(text(), 0..3),
        of(any::<(u32, u32)>()),
    );
    (numbers, any::<[u8; 32]>(), of(refs()), options, of(text())).prop_map(
        |((id, segment, created, uid, gid), root, base, (labels, excludes, owner), path)| Fork {
            id: ForkId(id >> 16),
            volume: segment,
            base,
            hit: Hit::Fallback,
            verdict: Verdict::Scope,
            root: NodeId(root),
            moved: base.map(|base| Moved {
                charged: base.number,
                ..Moved::default()
            }),
            first_segment: segment,
            next_epoch: segment,
            boot: path.clone().unwrap_or_default(),
            options: ForkOptions {
                size: segment,
                labels,
                owner,
                job: path.clone(),
                excludes,
                ..ForkOptions::default()
            },
            uid,
            gid,
            uid_map: path.clone(),
            created,
            mounts: path
                .map(|path| MountPoint {
                    path: path.into(),
                    folder: OsString::new(),
                    dev: segment,
                    created: true,
                    uid: Some(uid),
                })
                .into_iter()
                .collect(),
        },
    )
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    serde_json::from_slice(bytes).ok()
}

/// What can be read is the same when it is written and read again.
fn holds_still<T: DeserializeOwned + Serialize + PartialEq + Debug>(bytes: &[u8]) {
    if let Some(record) = parse::<T>(bytes) {
        assert_eq!(parse(&json(&record)), Some(record));
    }
}

proptest! {
    #[test]
    fn every_record_comes_back_as_it_was(volume in volumes(), version in versions(), fork in forks()) {
        prop_assert_eq!(parse(&json(&volume)), Some(volume));
        prop_assert_eq!(parse(&json(&version)), Some(version));
        prop_assert_eq!(parse(&json(&fork)), Some(fork));
    }

    #[test]
    fn hostile_records_are_refused_or_mean_one_thing(bytes in hostile::bytes(prop_oneof![
        volumes().prop_map(|record| json(&record)),
        versions().prop_map(|record| json(&record)),
        forks().prop_map(|record| json(&record)),
    ])) {
        holds_still::<Volume>(&bytes);
        holds_still::<Version>(&bytes);
        holds_still::<Fork>(&bytes);
    }

    #[test]
    fn a_fork_is_named_in_one_way(text in hostile::text("f-[0-9a-f]{12}")) {
        if let Ok(id) = text.parse::<ForkId>() {
            prop_assert_eq!(id.to_string(), text);
        }
    }

    #[test]
    fn the_number_of_a_key_is_read_if_there_is_one(key: Vec<u8>, id: u64) {
        prop_assert_eq!(keys::number(&key).is_some(), key.len() >= 9);
        prop_assert_eq!(keys::number(&keys::one(keys::FREE, id)), Some(id));
    }
}

#[test]
fn names_of_forks_that_only_look_like_some_are_none() {
    for text in [
        "f-+00000000001",
        "f-00000000000A",
        "f-0000000000001",
        "f-",
        "",
    ] {
        assert_eq!(text.parse::<ForkId>(), Err(()), "{text}");
    }
}

#[test]
fn the_format_of_keys_is_kept() {
    for (what, key, digits) in [
        ("!format", keys::FORMAT.to_vec(), "21666f726d6174"),
        (
            "!next-volume",
            keys::NEXT_VOLUME.to_vec(),
            "216e6578742d766f6c756d65",
        ),
        ("!next-ino", keys::NEXT_INO.to_vec(), "216e6578742d696e6f"),
        (
            "the key of a volume",
            keys::one(keys::VOLUME, 258),
            "76 0000000000000102",
        ),
        ("the key of a name", keys::name("a/b"), "6e 612f62"),
        (
            "the key of a version",
            keys::two(keys::VERSION, 258, 3),
            "72 0000000000000102 0000000000000003",
        ),
        (
            "the key of damage",
            keys::two(keys::DAMAGED, 258, 3),
            "64 0000000000000102 0000000000000003",
        ),
        (
            "the key of a pin",
            keys::two(keys::PIN, 258, 3),
            "70 0000000000000102 0000000000000003",
        ),
        (
            "the key of a fork",
            keys::one(keys::FORK, 258),
            "66 0000000000000102",
        ),
        (
            "the key of free numbers",
            keys::one(keys::FREE, 258),
            "75 0000000000000102",
        ),
    ] {
        assert_format(what, &key, digits);
    }
}

/// Fails if a record is written otherwise, or what was written is not read any more.
#[track_caller]
fn assert_record<T: Serialize + DeserializeOwned + PartialEq + Debug>(record: T, text: &str) {
    let written = String::from_utf8(json(&record)).unwrap();
    assert_eq!(
        written, text,
        "a record has another form: raise the format version (docs/format.md)"
    );
    assert_eq!(parse(text.as_bytes()), Some(record));
}

#[test]
fn the_format_of_records_is_kept() {
    let root = NodeId([0xab; 32]);
    let digits = "ab".repeat(32);
    assert_record(
        Volume {
            id: 1,
            name: "a/b".into(),
            created: 5,
            used: 6,
            head: 2,
            next: 3,
            taken_back: vec![(1, 2)],
        },
        r#"{"id":1,"name":"a/b","created":5,"used":6,"head":2,"next":3,"taken_back":[[1,2]]}"#,
    );
    let version = Version {
        volume: 1,
        number: 2,
        root,
        base: Some(VersionRef {
            volume: 1,
            number: 1,
        }),
        previous: 1,
        time: 7,
        job: None,
        labels: BTreeMap::from([("k".into(), "v".into())]),
        message: Some("m".into()),
        files: 3,
        logical_bytes: 4,
        blocks: 5,
        new_bytes: 6,
        has_acl: false,
        has_links: true,
        uid_map: None,
        excluded: LeftOut::default(),
    };
    let text = format!(
        r#"{{"volume":1,"number":2,"root":"{digits}","base":{{"volume":1,"number":1}},"previous":1,"time":7,"job":null,"labels":{{"k":"v"}},"message":"m","files":3,"logical_bytes":4,"blocks":5,"new_bytes":6,"has_acl":false,"has_links":true,"uid_map":null}}"#
    );
    assert_format(
        "the id of a version",
        Store::version_id(&version).as_bytes(),
        &blake3::hash(text.as_bytes()).to_hex(),
    );
    assert_record(version.clone(), &text);
    let excluded = LeftOut {
        paths: vec!["x/".into()],
        count: 9,
    };
    let end = text.len() - 1;
    assert_record(
        Version {
            excluded,
            ..version
        },
        &format!(
            r#"{},"excluded":{{"paths":["x/"],"count":9}}}}"#,
            &text[..end]
        ),
    );
    let totals = Totals {
        files: -1,
        logical_bytes: 2,
        blocks: 3,
        has_links: true,
        has_acl: false,
    };
    assert_record(
        Fork {
            id: ForkId(0x12),
            volume: 1,
            base: None,
            hit: Hit::Stale,
            verdict: Verdict::Nothing,
            root,
            moved: Some(Moved {
                totals,
                changed: 4,
                charged: 5,
                new_bytes: 6,
            }),
            first_segment: 2,
            next_epoch: 3,
            boot: "b".into(),
            options: ForkOptions {
                owner: Some((7, 8)),
                ..ForkOptions::default()
            },
            uid: 9,
            gid: 10,
            uid_map: None,
            created: 11,
            mounts: vec![MountPoint {
                path: "/m".into(),
                folder: "n".into(),
                dev: 12,
                created: false,
                uid: Some(13),
            }],
        },
        &format!(
            r#"{{"id":"f-000000000012","volume":1,"base":null,"hit":"stale","verdict":"nothing","root":"{digits}","moved":{{"totals":{{"files":-1,"logical_bytes":2,"blocks":3,"has_links":true,"has_acl":false}},"changed":4,"charged":5,"new_bytes":6}},"first_segment":2,"next_epoch":3,"boot":"b","options":{{"read_only":false,"ephemeral":false,"size":0,"labels":{{}},"owner":[7,8],"acl":false,"suid":false,"dev":false,"job":null,"excludes":[],"default_excludes":false}},"uid":9,"gid":10,"uid_map":null,"created":11,"mounts":[{{"path":{{"Unix":[47,109]}},"folder":{{"Unix":[110]}},"dev":12,"created":false,"uid":13}}]}}"#
        ),
    );
}

#[test]
fn what_a_store_begins_with_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), StoreOptions::default()).unwrap();
    let meta = |key: &[u8]| store.meta(key).unwrap().unwrap();
    assert_format("the format version", &meta(keys::FORMAT), "00000001");
    let volume = store.create_volume("v", 5).unwrap();
    store.lease_inodes(ForkId(1), 10).unwrap();
    assert_format(
        "the counter of volumes",
        &meta(keys::NEXT_VOLUME),
        "0000000000000002",
    );
    assert_format(
        "the counter of inodes",
        &meta(keys::NEXT_INO),
        "000000000000000c",
    );
    assert_format(
        "the index of names",
        &meta(&keys::name("v")),
        "0000000000000001",
    );
    let at = VersionRef {
        volume: volume.id,
        number: 3,
    };
    store.set_pin(at, true).unwrap();
    store.set_aside(at, "why").unwrap();
    assert_format("a pin", &meta(&keys::two(keys::PIN, 1, 3)), "31");
    assert_format("damage", &meta(&keys::two(keys::DAMAGED, 1, 3)), "776879");
    assert_format(
        "leased inode numbers",
        &meta(&keys::two(keys::LEASE, 1, 2)),
        "000000000000000a",
    );
    store.remove_fork(ForkId(1)).unwrap();
    assert_format(
        "free inode numbers",
        &meta(&keys::one(keys::FREE, 2)),
        "000000000000000a",
    );
    let state = std::fs::read(dir.path().join("state")).unwrap();
    assert_eq!(state, b"format 1\n");
}

#[test]
fn counters_that_cannot_be_are_damage_and_give_no_number_twice() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), StoreOptions::default()).unwrap();
    let put = |key: &[u8], value: &[u8]| {
        let mut batch = WriteBatch::default();
        store.put(&mut batch, Target::Meta, key, value).unwrap();
        store.write_unsynced(batch).unwrap();
    };
    let damaged = |what: &str| {
        let error = store.lease_inodes(ForkId(1), 10).unwrap_err();
        assert!(error.to_string().contains(what), "{error}");
    };
    for counter in [0, 1, u64::MAX - 3, 1 << 63] {
        put(keys::NEXT_INO, &u64::to_be_bytes(counter));
        damaged("the counter of inode numbers");
    }
    put(keys::NEXT_INO, b"short");
    damaged("the counter of inode numbers");
    for (start, count) in [(4, 0), (4, u64::MAX), (1, 5), (u64::MAX, 1)] {
        let key = keys::one(keys::FREE, start);
        put(&key, &u64::to_be_bytes(count));
        damaged("the free inode numbers");
        let mut batch = WriteBatch::default();
        store.delete(&mut batch, Target::Meta, &key).unwrap();
        store.write_unsynced(batch).unwrap();
    }
    put(keys::NEXT_VOLUME, &u64::MAX.to_be_bytes());
    let error = store.create_volume("v", 1).unwrap_err();
    assert!(
        error.to_string().contains("the counter of volumes"),
        "{error}"
    );
    for (name, value) in [("short", &b"1"[..]), ("none", &7_u64.to_be_bytes())] {
        put(&keys::name(name), value);
    }
    assert!(store.volume("short").is_err());
    assert_eq!(store.volume("none").unwrap(), None);
}

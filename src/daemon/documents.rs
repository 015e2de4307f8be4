//! What the engine tells, as the JSON documents of docs/json.md: times are RFC 3339, byte strings are [`Bytes`].

use std::os::unix::ffi::OsStrExt;

use serde_json::{Value, json};

use crate::engine::{
    Committed, DiffEntry, DiffKind, ForkInfo, ListEntry, MountInfo, VersionInfo, VolumeInfo,
};
use crate::protocol::{Bytes, Mount};
use crate::store::Verdict;

/// A time in nanoseconds since 1970.
fn time(nanos: i64) -> Value {
    match jiff::Timestamp::from_nanosecond(i128::from(nanos)) {
        Ok(time) => json!(time.to_string()),
        Err(_) => Value::Null,
    }
}

fn bytes(bytes: &[u8]) -> Bytes {
    Bytes(bytes.to_vec())
}

pub fn mount(mount: &MountInfo) -> Value {
    let MountInfo {
        fork,
        at,
        namespace,
    } = mount;
    json!(Mount {
        path: bytes(at.path.as_bytes()),
        folder: bytes(at.folder.as_bytes()),
        device: at.dev,
        created: at.created,
        uid: at.uid,
        namespace: *namespace,
        fork: Some(fork.to_string()),
    })
}

pub fn mounts(mounts: &[MountInfo]) -> Value {
    mounts.iter().map(mount).collect()
}

pub fn volume(volume: &VolumeInfo) -> Value {
    json!({
        "name": volume.name,
        "head": volume.head,
        "versions": volume.versions,
        "created": time(volume.created),
        "used": time(volume.used),
        "files": volume.files,
        "logical_bytes": volume.logical_bytes,
        "forks": volume.forks,
    })
}

pub fn version(version: &VersionInfo) -> Value {
    json!({
        "volume": version.volume,
        "number": version.number,
        "id": version.id,
        "time": time(version.time),
        "base": version.base,
        "previous": version.previous,
        "head": version.head,
        "pinned": version.pinned,
        "damaged": version.damaged,
        "job": version.job,
        "labels": version.labels,
        "message": version.message,
        "files": version.files,
        "logical_bytes": version.logical_bytes,
        "new_bytes": version.new_bytes,
        "excluded": version.excluded,
    })
}

pub fn trust(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Off => "off",
        Verdict::Trusted => "trusted",
        Verdict::Nothing | Verdict::Scope => "untrusted",
    }
}

pub fn fork(fork: &ForkInfo) -> Value {
    json!({
        "id": fork.id,
        "state": fork.state,
        "volume": fork.volume,
        "base": fork.base,
        "base_uid_map": fork.base_uid_map,
        "hit": fork.hit,
        "trust": trust(fork.verdict),
        "refused": fork.refused,
        "mount": fork.mounts.first().map(mount),
        "mounts": mounts(&fork.mounts),
        "job": fork.job,
        "created": time(fork.created),
        "age": fork.age,
        "uid": fork.uid,
        "gid": fork.gid,
        "read_only": fork.read_only,
        "ephemeral": fork.ephemeral,
        "suid": fork.suid,
        "dev": fork.dev,
        "size": fork.size,
        "changed": fork.changed,
        "bytes": fork.bytes,
        "read": fork.read,
        "ingested": fork.ingested,
        "requests": fork.requests,
    })
}

pub fn commit(commit: &Committed) -> Value {
    json!({
        "fork": commit.fork.to_string(),
        "version": commit.version.as_ref().map(version),
        "mount": commit.mounts.first().map(mount),
        "mounts": mounts(&commit.mounts),
        "excluded": commit.excluded,
    })
}

pub fn entry(entry: &ListEntry) -> Value {
    json!({
        "name": bytes(&entry.name),
        "ino": entry.ino,
        "mode": entry.mode,
        "uid": entry.uid,
        "gid": entry.gid,
        "size": entry.size,
        "mtime": time(entry.mtime),
        "nlink": entry.nlink,
        "target": entry.target.as_deref().map(bytes),
    })
}

pub fn change(change: &DiffEntry) -> Value {
    let kind = match change.kind {
        DiffKind::Added => "added",
        DiffKind::Removed => "removed",
        DiffKind::Changed => "changed",
        DiffKind::Renamed => "renamed",
    };
    // As in all documents, a path begins at the root of its volume and has no slash there.
    let below = |path: &[u8]| bytes(path.strip_prefix(b"/").unwrap_or(path));
    json!({
        "kind": kind,
        "path": below(&change.path),
        "from": change.from.as_deref().map(below),
        "old_size": change.old_size,
        "new_size": change.new_size,
    })
}

/// The documents of a list.
pub fn list<T>(items: &[T], one: impl Fn(&T) -> Value) -> Value {
    items.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::LeftOut;
    use crate::store::MountPoint;

    /// The example of docs/json.md with this name.
    fn example(name: &str) -> Value {
        let text = include_str!("../../docs/json.md");
        let begin = format!("```json {name}\n");
        let (_, rest) = text.split_once(&begin).expect(name);
        serde_json::from_str(rest.split("```").next().unwrap()).expect(name)
    }

    /// The names of all fields, nested ones with their path.
    fn names(value: &Value) -> Vec<String> {
        let inner = |(name, value): (&String, &Value)| {
            let below: Vec<String> = names(value).iter().map(|n| format!("{name}.{n}")).collect();
            std::iter::once(name.clone())
                .chain(below)
                .collect::<Vec<_>>()
        };
        value
            .as_object()
            .into_iter()
            .flatten()
            .flat_map(inner)
            .collect()
    }

    #[test]
    fn documents_are_those_of_the_manual() {
        let the_mount = MountInfo {
            fork: "f-0123456789ab".parse().unwrap(),
            at: MountPoint {
                path: "/mnt/npm".into(),
                folder: "".into(),
                dev: 41,
                created: true,
                uid: Some(1000),
            },
            namespace: Some(4_026_531_841),
        };
        let the_volume = VolumeInfo {
            name: "npm".into(),
            head: Some(42),
            versions: 12,
            created: 0,
            used: 0,
            files: 0,
            logical_bytes: 0,
            forks: 3,
        };
        let the_version = VersionInfo {
            volume: "npm".into(),
            number: 42,
            id: "x9f3c1a".into(),
            time: 0,
            base: None,
            previous: Some(41),
            head: true,
            pinned: false,
            damaged: None,
            job: None,
            labels: [("os".to_owned(), "debian12".to_owned())].into(),
            message: None,
            files: 0,
            logical_bytes: 0,
            new_bytes: 0,
            excluded: LeftOut::default(),
        };
        let the_fork = ForkInfo {
            id: "f-0123456789ab".into(),
            state: "live",
            volume: "npm".into(),
            base: None,
            base_uid_map: None,
            hit: crate::store::Hit::Exact,
            verdict: Verdict::Off,
            refused: None,
            mounts: vec![the_mount.clone()],
            job: None,
            created: 0,
            age: 12.5,
            uid: 1000,
            gid: 1000,
            read_only: false,
            ephemeral: false,
            suid: false,
            dev: false,
            size: 0,
            changed: 0,
            bytes: 0,
            read: 8192,
            ingested: 0,
            requests: [("lookup", 120), ("read", 3)].into(),
        };
        let the_commit = Committed {
            fork: "f-0123456789ab".parse().unwrap(),
            version: None,
            mounts: vec![the_mount],
            excluded: LeftOut::default(),
        };
        let the_change = DiffEntry {
            kind: DiffKind::Renamed,
            path: b"a/\xff".to_vec(),
            from: Some(b"a/b".to_vec()),
            old_size: 10,
            new_size: 12,
        };
        let the_entry = ListEntry {
            name: b"lib.js".to_vec(),
            ino: 77,
            mode: 0,
            uid: 0,
            gid: 0,
            size: 120,
            mtime: 0,
            nlink: 1,
            target: None,
        };
        for (name, document) in [
            ("volume", volume(&the_volume)),
            ("version", version(&the_version)),
            ("fork", fork(&the_fork)),
            ("commit", commit(&the_commit)),
            ("change", change(&the_change)),
            ("entry", entry(&the_entry)),
        ] {
            let (mut said, mut made) = (names(&example(name)), names(&document));
            said.sort();
            made.sort();
            assert_eq!(said, made, "{name}");
        }
        let status: crate::protocol::Status = serde_json::from_value(example("status")).unwrap();
        assert_eq!(json!(status), example("status"));
    }

    #[test]
    fn times_are_rfc_3339() {
        assert_eq!(time(0), json!("1970-01-01T00:00:00Z"));
        assert_eq!(time(1_500_000_000), json!("1970-01-01T00:00:01.5Z"));
    }

    #[test]
    fn paths_may_be_any_bytes() {
        let entry = DiffEntry {
            kind: DiffKind::Renamed,
            path: b"/a/\xff".to_vec(),
            from: Some(b"/b".to_vec()),
            old_size: 1,
            new_size: 2,
        };
        let expected = json!({"kind": "renamed", "path": {"b64": "YS//"}, "from": "b", "old_size": 1, "new_size": 2});
        assert_eq!(change(&entry), expected);
    }
}

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

use super::*;
use crate::fork::extent::{Extent, Origin};
use crate::hostile::{self, assert_format, hex};
use crate::record::tests::{attrs, inos, names};
use crate::record::{Ino, Kind};
use crate::tree::NodeId;

fn edits(n: u64) -> Vec<Edit> {
    vec![
        Edit::Truncate {
            ino: Ino(n),
            page: n,
        },
        Edit::Orphan { ino: Ino(n) },
    ]
}

fn written(dir: &Path, records: u64) -> Log {
    let mut log = Log::create(dir, 7, 1).unwrap();
    for n in 1..=records {
        log.append(
            Request {
                epoch: 1,
                unique: n,
            },
            &edits(n),
        )
        .unwrap();
    }
    log
}

fn replayed(dir: &Path) -> Result<(Vec<u64>, Log), LogError> {
    let mut seen = Vec::new();
    let log = Log::replay(dir, 7, 1, |request, found| {
        assert_eq!(found, edits(request.unique));
        seen.push(request.unique);
    })?;
    Ok((seen, log))
}

#[test]
fn room_for_the_next_records_is_taken_ahead_and_stays_behind_a_restart() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().unwrap();
    let path = segment(dir.path(), 1);
    let has_room = |records: u64| {
        let metadata = fs::metadata(&path).unwrap();
        let room = metadata.blocks() * 512 - metadata.len();
        assert!(room >= ROOM / 2, "{room} bytes behind {records} records");
        metadata.len()
    };
    drop(written(dir.path(), 0));
    assert_eq!(has_room(0), HEADER);
    drop(written(dir.path(), 20_000));
    let len = has_room(20_000);
    assert_eq!(replayed(dir.path()).unwrap().0.len(), 20_000);
    assert_eq!(has_room(20_000), len);
}

#[test]
fn replay_gives_back_every_record_of_every_segment_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = written(dir.path(), 3);
    assert_eq!(log.next_segment().unwrap(), 2);
    log.append(
        Request {
            epoch: 1,
            unique: 4,
        },
        &edits(4),
    )
    .unwrap();
    let (seen, mut log) = replayed(dir.path()).unwrap();
    assert_eq!(seen, [1, 2, 3, 4]);
    log.append(
        Request {
            epoch: 2,
            unique: 5,
        },
        &edits(5),
    )
    .unwrap();
    assert_eq!(replayed(dir.path()).unwrap().0, [1, 2, 3, 4, 5]);
}

#[test]
fn a_log_cut_anywhere_keeps_every_whole_record_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    written(dir.path(), 3);
    let path = segment(dir.path(), 1);
    let whole = fs::read(&path).unwrap();
    for end in HEADER as usize..whole.len() {
        fs::write(&path, &whole[..end]).unwrap();
        let (seen, mut log) = replayed(dir.path()).unwrap();
        log.append(
            Request {
                epoch: 1,
                unique: 9,
            },
            &edits(9),
        )
        .unwrap();
        assert_eq!(
            replayed(dir.path()).unwrap().0,
            [seen, vec![9]].concat(),
            "{end} bytes"
        );
    }
}

#[test]
fn damage_before_the_last_record_is_reported_and_never_cut() {
    let dir = tempfile::tempdir().unwrap();
    written(dir.path(), 3);
    let path = segment(dir.path(), 1);
    let whole = fs::read(&path).unwrap();
    for at in [
        0,
        9,
        17,
        HEADER as usize,
        HEADER as usize + 4,
        HEADER as usize + 9,
    ] {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        fs::write(&path, &bytes).unwrap();
        assert!(
            matches!(replayed(dir.path()), Err(LogError::Damaged { .. })),
            "byte {at}"
        );
        assert_eq!(fs::read(&path).unwrap(), bytes);
    }
}

/// Any edit that a fork may log.
pub(crate) fn any_edit() -> impl Strategy<Value = Edit> + Clone {
    let page = || 0_u64..1 << 51;
    let value = prop::option::of(vec(any::<u8>(), 0..20));
    let origin = prop_oneof![
        (page(), any::<bool>()).prop_map(|(at, owned)| Origin::Spool { at, owned }),
        (inos(), page()).prop_map(|(ino, page)| Origin::Base { ino, page }),
        any::<bool>().prop_map(|reserved| Origin::Hole { reserved }),
    ];
    let child = prop::option::of((inos(), Just(Kind::Fifo)));
    prop_oneof![
        (inos(), attrs()).prop_map(|(ino, attr)| Edit::Attr { ino, attr }),
        (inos(), 1_u64..1 << 56, names(), child).prop_map(|(dir, hash, name, child)| Edit::Entry {
            dir,
            hash,
            name: name.into(),
            child
        }),
        (inos(), names(), value).prop_map(|(ino, name, value)| Edit::Xattr {
            ino,
            name: name.into(),
            value: value.map(Into::into)
        }),
        (inos(), inos(), names()).prop_map(|(ino, parent, name)| Edit::Unlinked {
            ino,
            parent,
            name: name.into()
        }),
        (inos(), page(), 1_u64..1 << 51, origin).prop_map(|(ino, page, pages, origin)| {
            let extent = Extent {
                page,
                pages,
                origin,
            };
            Edit::Extent { ino, extent }
        }),
        (inos(), page()).prop_map(|(ino, page)| Edit::Truncate { ino, page }),
        inos().prop_map(|ino| Edit::Orphan { ino }),
        (inos(), attrs(), any::<[u8; 32]>(), page()).prop_map(|(ino, attr, base, base_pages)| {
            Edit::Carry {
                ino,
                attr,
                base: NodeId(base),
                base_pages,
            }
        }),
        inos().prop_map(|ino| Edit::Remove { ino }),
    ]
}

fn encoded(edits: &[Edit]) -> Vec<u8> {
    let mut bytes = Vec::new();
    edits.iter().for_each(|edit| edit.encode_to(&mut bytes));
    bytes
}

/// A log of as many segments, and what a replay of it gives.
fn write_log(dir: &Path, segments: &[Vec<Vec<Edit>>]) -> Vec<Vec<Edit>> {
    let mut log = Log::create(dir, 7, 1).unwrap();
    for (at, records) in segments.iter().enumerate() {
        if at > 0 {
            log.next_segment().unwrap();
        }
        for edits in records {
            log.append(Request::default(), edits).unwrap();
        }
    }
    segments.concat()
}

fn replay_all(dir: &Path) -> Result<Vec<Vec<Edit>>, LogError> {
    let mut seen = Vec::new();
    Log::replay(dir, 7, 1, |_, edits| seen.push(edits))?;
    Ok(seen)
}

proptest! {
    #[test]
    fn edits_have_one_encoding(bytes in hostile::bytes(vec(any_edit(), 1..5).prop_map(|edits| encoded(&edits)))) {
        let mut rest = bytes.as_slice();
        let mut before = rest;
        while let Some(edit) = Edit::take(&mut rest) {
            prop_assert_eq!(encoded(&[edit]), &before[..before.len() - rest.len()]);
            before = rest;
        }
    }

    #[test]
    fn every_record_comes_back_as_it_was(records in vec(vec(any_edit(), 0..4), 1..5)) {
        let dir = tempfile::tempdir().unwrap();
        let written = write_log(dir.path(), &[records.clone(), Vec::new(), records]);
        prop_assert_eq!(replay_all(dir.path()).unwrap(), written);
    }

    /// Of a log with a changed byte a replay gives all, or all but the very last record, or an error that leaves it as it is.
    #[test]
    fn a_changed_byte_loses_no_record_but_the_last(
        segments in vec(vec(vec(any_edit(), 0..4), 1..4), 1..3),
        which in any::<Index>(),
        at in any::<Index>(),
        bits in 1_u8..,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let written = write_log(dir.path(), &segments);
        let path = segment(dir.path(), 1 + which.index(segments.len()) as u64);
        let mut bytes = fs::read(&path).unwrap();
        let at = at.index(bytes.len());
        bytes[at] ^= bits;
        fs::write(&path, &bytes).unwrap();
        match replay_all(dir.path()) {
            Ok(seen) => prop_assert_eq!(seen, &written[..written.len() - 1]),
            Err(error) => {
                prop_assert!(matches!(error, LogError::Damaged { .. }), "{}", error);
                prop_assert_eq!(fs::read(&path).unwrap(), bytes);
            }
        }
    }

    #[test]
    fn hostile_segments_are_read_or_reported(
        segments in vec(vec(vec(any_edit(), 0..3), 1..4), 1..3),
        which in any::<Index>(),
        seed in hostile::bytes(Just(vec![0_u8; 600])),
    ) {
        let dir = tempfile::tempdir().unwrap();
        write_log(dir.path(), &segments);
        let path = segment(dir.path(), 1 + which.index(segments.len()) as u64);
        let own = fs::read(&path).unwrap();
        let zeros = std::iter::repeat(&0);
        let mixed: Vec<u8> = own.iter().zip(seed.iter().chain(zeros)).map(|(a, b)| a ^ b).collect();
        for bytes in [mixed, seed, own[..own.len() / 2].to_vec()] {
            fs::write(&path, &bytes).unwrap();
            match replay_all(dir.path()) {
                // What could be read goes on, and is the same when it is read again.
                Ok(seen) => prop_assert_eq!(replay_all(dir.path()).unwrap(), seen),
                Err(_) => prop_assert_eq!(fs::read(&path).unwrap(), bytes),
            }
        }
    }
}

#[test]
fn a_damaged_length_does_not_take_the_records_behind_it_along() {
    let dir = tempfile::tempdir().unwrap();
    written(dir.path(), 3);
    let path = segment(dir.path(), 1);
    let whole = fs::read(&path).unwrap();
    for bit in 0..32 {
        let mut bytes = whole.clone();
        bytes[HEADER as usize + bit / 8] ^= 1 << (bit % 8);
        fs::write(&path, &bytes).unwrap();
        let error = replayed(dir.path()).unwrap_err().to_string();
        assert!(
            error.contains("is damaged at byte 24: "),
            "bit {bit}: {error}"
        );
        assert_eq!(fs::read(&path).unwrap(), bytes, "bit {bit}");
    }
}

#[test]
fn a_missing_segment_is_reported_and_not_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    write_log(
        dir.path(),
        &[vec![edits(1)], vec![edits(2)], vec![edits(3)]],
    );
    for number in [1, 2] {
        let path = segment(dir.path(), number);
        let bytes = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let error = replay_all(dir.path()).unwrap_err().to_string();
        let name = format!("log-0000000{number} is damaged at byte 0: the segment is missing");
        assert!(error.contains(&name), "{error}");
        fs::write(&path, bytes).unwrap();
    }
    assert_eq!(replay_all(dir.path()).unwrap().len(), 3);
    assert!(replay_all(tempfile::tempdir().unwrap().path()).is_err());
}

#[test]
fn a_segment_whose_making_was_cut_short_is_made_again() {
    let dir = tempfile::tempdir().unwrap();
    written(dir.path(), 2).next_segment().unwrap();
    let path = segment(dir.path(), 2);
    let header = fs::read(&path).unwrap();
    for end in 0..header.len() {
        fs::write(&path, &header[..end]).unwrap();
        let (seen, log) = replayed(dir.path()).unwrap();
        assert_eq!((seen, log.number), (vec![1, 2], 2), "{end} bytes");
        assert_eq!(fs::read(&path).unwrap(), header);
    }
    // The first one that a fork names has never been without.
    let first = segment(dir.path(), 1);
    fs::write(&first, &fs::read(&first).unwrap()[..9]).unwrap();
    assert!(replayed(dir.path()).is_err());
}

#[test]
fn a_record_that_no_replay_would_take_is_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = written(dir.path(), 1);
    let long = |len: usize| Edit::Xattr {
        ino: Ino(1),
        name: b"user.k"[..].into(),
        value: Some(vec![0; len].into()),
    };
    let error = log
        .append(Request::default(), [&long(BODY_MAX)])
        .unwrap_err();
    assert!(error.to_string().contains("longer than the log"), "{error}");
    let parts: Vec<Edit> = (0..600).map(|_| long(64 << 10)).collect();
    log.append_in_parts(&parts).unwrap();
    drop(log);
    let seen = replay_all(dir.path()).unwrap();
    assert_eq!(seen[1..].concat(), parts);
    assert!(seen.len() > 30, "{} records", seen.len());
}

#[test]
fn the_format_of_a_segment_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = Log::create(dir.path(), 0x0102, 3).unwrap();
    let request = Request {
        epoch: 5,
        unique: 300,
    };
    log.append(request, [&Edit::Orphan { ino: Ino(200) }])
        .unwrap();
    let path = dir.path().join("log-00000003");
    // The magic, fork, number; then length, CRC-32, epoch, unique, and the edit.
    let digits =
        "46564c4f47000001 0201000000000000 0300000000000000 06000000 59f1ba8f 05 ac02 07 c801";
    assert_format("a segment of a log", &fs::read(&path).unwrap(), digits);
    fs::write(&path, hex(digits)).unwrap();
    let mut seen = Vec::new();
    Log::replay(dir.path(), 0x0102, 3, |request, edits| {
        seen.push((request, edits));
    })
    .unwrap();
    assert_eq!(seen, [(request, vec![Edit::Orphan { ino: Ino(200) }])]);
}

#[test]
fn the_format_of_edits_is_kept() {
    let ino = Ino(300);
    let attr = crate::record::Attr {
        kind: Kind::Fifo,
        mode: 0o600,
        uid: 1,
        gid: 2,
        rdev: 0,
        nlink: 1,
        size: 0,
        blocks: 0,
        atime: 1_577_836_800_000_000_000,
        mtime: 1_577_836_800_000_000_000,
        ctime: 1_577_836_800_000_000_000,
        btime: 1_577_836_800_000_000_000,
        parent: Ino(0),
    };
    let name = || b"ab"[..].into();
    let extent = |origin| Edit::Extent {
        ino,
        extent: Extent {
            page: 3,
            pages: 400,
            origin,
        },
    };
    let attributes = "01 8003 01 02 00 01 00 00 00 00 00 00";
    let root = "01".repeat(32);
    for (edit, digits) in [
        (
            Edit::Attr {
                ino,
                attr: attr.clone(),
            },
            format!("01 ac02 {attributes}"),
        ),
        (
            Edit::Entry {
                dir: ino,
                hash: 1 << 55,
                name: name(),
                child: Some((Ino(4), Kind::Symlink)),
            },
            "02 ac02 8080808080808040 02 6162 04 0a".into(),
        ),
        (
            Edit::Entry {
                dir: ino,
                hash: 1,
                name: name(),
                child: None,
            },
            "02 ac02 01 02 6162 00".into(),
        ),
        (
            Edit::Xattr {
                ino,
                name: name(),
                value: Some(b"v"[..].into()),
            },
            "03 ac02 02 6162 01 01 76".into(),
        ),
        (
            Edit::Xattr {
                ino,
                name: name(),
                value: None,
            },
            "03 ac02 02 6162 00".into(),
        ),
        (
            Edit::Unlinked {
                ino,
                parent: Ino(1),
                name: name(),
            },
            "04 ac02 01 02 6162".into(),
        ),
        (
            extent(Origin::Spool {
                at: 9,
                owned: false,
            }),
            "05 ac02 03 9003 00 09".into(),
        ),
        (
            extent(Origin::Spool { at: 9, owned: true }),
            "05 ac02 03 9003 01 09".into(),
        ),
        (
            extent(Origin::Base {
                ino: Ino(6),
                page: 2,
            }),
            "05 ac02 03 9003 02 06 02".into(),
        ),
        (
            extent(Origin::Hole { reserved: false }),
            "05 ac02 03 9003 03".into(),
        ),
        (
            extent(Origin::Hole { reserved: true }),
            "05 ac02 03 9003 04".into(),
        ),
        (Edit::Truncate { ino, page: 12 }, "06 ac02 0c".into()),
        (Edit::Orphan { ino }, "07 ac02".into()),
        (
            Edit::Carry {
                ino,
                attr,
                base: NodeId([1; 32]),
                base_pages: 5,
            },
            format!("08 ac02 {attributes} {root} 05"),
        ),
        (Edit::Remove { ino }, "09 ac02".into()),
    ] {
        let what = format!("{edit:?}");
        assert_format(&what, &encoded(std::slice::from_ref(&edit)), &digits);
        assert_eq!(Edit::take(&mut hex(&digits).as_slice()), Some(edit));
    }
}

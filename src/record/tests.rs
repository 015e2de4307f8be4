use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::hostile::{self, assert_format, hex};

fn attr() -> Attr {
    Attr {
        kind: Kind::Directory,
        mode: 0o1755,
        uid: 1000,
        gid: 100,
        rdev: 0,
        nlink: 3,
        size: 0,
        blocks: 0,
        atime: -5,
        mtime: EPOCH_2020 + 123_456_789,
        ctime: EPOCH_2020 + 987_654_321,
        btime: i64::MIN,
        parent: Ino(7),
    }
}

#[test]
fn attributes_come_back_as_they_were() {
    assert_eq!(Attr::decode(&attr().encode()), Some(attr()));
    let file = Attr {
        kind: Kind::File,
        parent: Ino(0),
        size: SIZE_MAX,
        ..attr()
    };
    assert_eq!(Attr::decode(&file.encode()), Some(file));
}

#[test]
fn cut_or_lengthened_attributes_are_refused() {
    let bytes = attr().encode();
    for end in 0..bytes.len() {
        assert_eq!(Attr::decode(&bytes[..end]), None, "{end} bytes");
    }
    assert_eq!(Attr::decode(&[bytes, vec![0]].concat()), None);
}

#[test]
fn keys_come_back_as_they_were_and_sort_by_inode() {
    let name = b"a name".as_slice();
    let (ino, dir) = (Ino(5), Ino(3));
    assert_eq!(Key::parse(&attr_key(ino)), Some(Key::Attr(ino)));
    let entry = entry_key(dir, hash56(name), name);
    assert_eq!(
        Key::parse(&entry),
        Some(Key::Entry {
            dir,
            hash: hash56(name),
            name
        })
    );
    assert_eq!(
        Key::parse(&xattr_key(ino, name)),
        Some(Key::Xattr { ino, name })
    );
    let backref = backref_key(ino, dir, name);
    assert_eq!(
        Key::parse(&backref),
        Some(Key::Backref {
            ino,
            parent: dir,
            name
        })
    );
    assert_eq!(
        Key::parse(&content_key(ino, 9)),
        Some(Key::Content { ino, offset: 9 })
    );
    assert!(attr_key(Ino(255)) < attr_key(Ino(256)) && backref < content_key(Ino(1), 0));
    assert_eq!(Key::parse(&[0; 10]), None);
}

#[test]
fn only_values_in_chunks_name_one() {
    let id = ChunkId([7; 32]);
    let value = Value::Chunk { len: 2000, id }.encode();
    assert_eq!(chunk_refs(&content_key(Ino(2), 0), &value), Ok(Some(id)));
    assert_eq!(chunk_refs(&attr_key(Ino(2)), &value), Ok(None));
    let inline = Value::Inline(vec![1; 40]);
    let refs = chunk_refs(&content_key(Ino(2), 0), &inline.encode());
    assert_eq!(refs, Ok(None));
    assert!(chunk_refs(b"no key", &value).is_err());
    assert!(chunk_refs(&content_key(Ino(2), 0), b"\x07").is_err());
    assert_eq!(Value::decode(&inline.encode()), Some(inline));
}

/// A kind of inode, all of them.
fn kind() -> impl Strategy<Value = Kind> + Clone {
    prop::sample::select(vec![
        Kind::Fifo,
        Kind::CharDevice,
        Kind::Directory,
        Kind::BlockDevice,
        Kind::File,
        Kind::Symlink,
        Kind::Socket,
    ])
}

/// Attributes of any inode that a fork may hold.
pub(crate) fn attrs() -> impl Strategy<Value = Attr> + Clone {
    let numbers = (0_u16..=0o7777, any::<[u32; 4]>());
    let sizes = (0..=SIZE_MAX, any::<u64>());
    (kind(), numbers, sizes, any::<[i64; 4]>(), inos()).prop_map(
        |(kind, (mode, [uid, gid, rdev, nlink]), (size, blocks), times, parent)| Attr {
            kind,
            mode,
            uid,
            gid,
            rdev,
            nlink,
            size,
            blocks,
            atime: times[0],
            mtime: times[1],
            ctime: times[2],
            btime: times[3],
            parent: if kind == Kind::Directory {
                parent
            } else {
                Ino(0)
            },
        },
    )
}

/// A name as a directory may hold it.
pub(crate) fn names() -> impl Strategy<Value = Vec<u8>> + Clone {
    vec(any::<u8>(), 1..40).prop_filter("no name", |name| is_name(name))
}

/// An inode, with a low number or any.
pub(crate) fn inos() -> impl Strategy<Value = Ino> + Clone {
    prop_oneof![1..9_u64, 1..=i64::MAX as u64].prop_map(Ino)
}

fn keys() -> impl Strategy<Value = Vec<u8>> + Clone {
    prop_oneof![
        inos().prop_map(attr_key),
        (inos(), names()).prop_map(|(dir, name)| entry_key(dir, hash56(&name), &name)),
        (inos(), names()).prop_map(|(ino, name)| xattr_key(ino, &name)),
        (inos(), inos(), names()).prop_map(|(ino, parent, name)| backref_key(ino, parent, &name)),
        (inos(), 0..=SIZE_MAX).prop_map(|(ino, offset)| content_key(ino, offset)),
    ]
}

fn values() -> impl Strategy<Value = Value> + Clone {
    prop_oneof![
        vec(any::<u8>(), 0..=chunk::INLINE_MAX).prop_map(Value::Inline),
        (1..=chunk::MAX as u64, any::<[u8; 32]>()).prop_map(|(len, id)| Value::Chunk {
            len,
            id: ChunkId(id)
        }),
    ]
}

fn key_bytes(key: Key<'_>) -> Vec<u8> {
    match key {
        Key::Attr(ino) => attr_key(ino),
        Key::Entry { dir, hash, name } => entry_key(dir, hash, name),
        Key::Xattr { ino, name } => xattr_key(ino, name),
        Key::Backref { ino, parent, name } => backref_key(ino, parent, name),
        Key::Content { ino, offset } => content_key(ino, offset),
    }
}

proptest! {
    #[test]
    fn every_record_comes_back_as_it_was(attr in attrs(), value in values(), key in keys(), child in inos(), kind in kind()) {
        prop_assert_eq!(Attr::decode(&attr.encode()), Some(attr));
        prop_assert_eq!(Value::decode(&value.encode()), Some(value));
        prop_assert_eq!(Key::parse(&key).map(key_bytes), Some(key));
        prop_assert_eq!(decode_entry(&encode_entry(child, kind)), Some((child, kind)));
    }

    #[test]
    fn attributes_have_one_encoding(bytes in hostile::bytes(attrs().prop_map(|attr| attr.encode()))) {
        if let Some(attr) = Attr::decode(&bytes) {
            prop_assert_eq!(attr.encode(), bytes);
        }
    }

    #[test]
    fn values_have_one_encoding_and_a_bound(bytes in hostile::bytes(values().prop_map(|value| value.encode()))) {
        if let Some(value) = Value::decode(&bytes) {
            prop_assert!(value.len() <= chunk::MAX as u64);
            prop_assert_eq!(value.encode(), bytes);
        }
    }

    #[test]
    fn entries_have_one_encoding(bytes in hostile::bytes((inos(), kind()).prop_map(|(ino, kind)| encode_entry(ino, kind)))) {
        if let Some((child, kind)) = decode_entry(&bytes) {
            prop_assert_eq!(encode_entry(child, kind), bytes);
        }
    }

    #[test]
    fn keys_have_one_form_and_only_true_names(bytes in hostile::bytes(keys())) {
        if let Some(key) = Key::parse(&bytes) {
            if let Key::Entry { name, .. } | Key::Backref { name, .. } = key {
                prop_assert!(is_name(name));
            }
            prop_assert_eq!(key_bytes(key), bytes);
        }
    }
}

#[test]
fn what_leads_elsewhere_is_no_name() {
    for name in [&b""[..], b".", b"..", b"a/b", b"a\0", &[b'x'; NAME_MAX + 1]] {
        assert!(!is_name(name), "{}", name.escape_ascii());
        assert_eq!(Key::parse(&entry_key(ROOT, 1, name)), None);
        assert_eq!(Key::parse(&backref_key(Ino(2), ROOT, name)), None);
    }
    assert!(is_name(b"...") && is_name(&[0xff; NAME_MAX]));
}

#[test]
fn an_inode_has_a_number_and_a_next_one() {
    for number in [0, 1 << 63, u64::MAX] {
        assert_eq!(Ino::of(number), None);
        assert_eq!(Key::parse(&attr_key(Ino(number))), None);
        assert_eq!(Key::parse(&backref_key(ROOT, Ino(number), b"a")), None);
        assert_eq!(decode_entry(&encode_entry(Ino(number), Kind::File)), None);
        let folder = Attr {
            parent: Ino(number),
            ..attr()
        };
        assert_eq!(Attr::decode(&folder.encode()), None);
    }
}

#[test]
fn content_is_nowhere_longer_than_its_kind() {
    let id = ChunkId([7; 32]);
    for len in [0, chunk::MAX as u64 + 1, u64::MAX] {
        assert_eq!(Value::decode(&Value::Chunk { len, id }.encode()), None);
    }
    let long = Value::Inline(vec![0; chunk::INLINE_MAX + 1]);
    assert_eq!(Value::decode(&long.encode()), None);
    assert_eq!(Key::parse(&content_key(ROOT, SIZE_MAX + 1)), None);
}

#[test]
fn the_format_of_attributes_is_kept() {
    let time = EPOCH_2020 + 1;
    let file = Attr {
        kind: Kind::File,
        mode: 0o644,
        uid: 1000,
        gid: 100,
        rdev: 0,
        nlink: 2,
        size: 5000,
        blocks: 16,
        mtime: time,
        ctime: time + 1_000_000_000,
        btime: time,
        atime: time,
        parent: Ino(0),
    };
    let folder = Attr {
        kind: Kind::Directory,
        mode: 0o1755,
        uid: 0,
        gid: 0xffff_fffe,
        nlink: 3,
        size: 0,
        blocks: 0,
        mtime: 0,
        ctime: 0,
        btime: 0,
        atime: 0,
        parent: Ino(7),
        ..file.clone()
    };
    for (what, attr, digits) in [
        (
            "the attributes of a file",
            file,
            "08 a403 e807 64 00 02 8827 10 02 80a8d6b907 ffa7d6b907 00",
        ),
        (
            "the attributes of a directory",
            folder,
            "04 ed07 00 feffffff0f 00 03 00 00 ffffcf98b78dcde52b 00 00 00 07",
        ),
    ] {
        assert_format(what, &attr.encode(), digits);
        assert_eq!(Attr::decode(&hex(digits)), Some(attr));
    }
}

#[test]
fn the_format_of_keys_is_kept() {
    let (ino, dir, name) = (Ino(0x0102), Ino(3), &b"a name"[..]);
    let hash = hash56(name);
    for (what, bytes, digits, key) in [
        (
            "the key of attributes",
            attr_key(ino),
            "00 0000000000000102 00",
            Key::Attr(ino),
        ),
        (
            "the key of a directory entry",
            entry_key(dir, hash, name),
            "00 0000000000000003 01 e2603b2847fa55 61206e616d65",
            Key::Entry { dir, hash, name },
        ),
        (
            "the key of an extended attribute",
            xattr_key(ino, name),
            "00 0000000000000102 02 61206e616d65",
            Key::Xattr { ino, name },
        ),
        (
            "the key of a back reference",
            backref_key(ino, dir, name),
            "00 0000000000000102 03 0000000000000003 61206e616d65",
            Key::Backref {
                ino,
                parent: dir,
                name,
            },
        ),
        (
            "the key of content",
            content_key(ino, 0x1_0000),
            "01 0000000000000102 0000000000010000",
            Key::Content {
                ino,
                offset: 0x1_0000,
            },
        ),
    ] {
        assert_format(what, &bytes, digits);
        assert_eq!(Key::parse(&hex(digits)), Some(key));
    }
}

#[test]
fn the_format_of_entries_and_values_is_kept() {
    let digits = "0a ac02";
    assert_format(
        "a directory entry",
        &encode_entry(Ino(300), Kind::Symlink),
        digits,
    );
    assert_eq!(decode_entry(&hex(digits)), Some((Ino(300), Kind::Symlink)));
    let id = ChunkId(std::array::from_fn(|at| at as u8));
    for (what, value, digits) in [
        (
            "content in the tree",
            Value::Inline(b"hi".to_vec()),
            "00 6869",
        ),
        ("no content", Value::Inline(Vec::new()), "00"),
        (
            "content in a chunk",
            Value::Chunk { len: 65_536, id },
            "01 808004 000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f",
        ),
    ] {
        assert_format(what, &value.encode(), digits);
        assert_eq!(Value::decode(&hex(digits)), Some(value));
    }
}

#[test]
fn a_fixed_state_has_a_fixed_root() {
    let (file, time) = (Ino(2), EPOCH_2020 + 5);
    let folder = Attr {
        kind: Kind::Directory,
        mode: 0o755,
        uid: 0,
        gid: 0,
        rdev: 0,
        nlink: 2,
        size: 0,
        blocks: 0,
        atime: time,
        mtime: time,
        ctime: time,
        btime: time,
        parent: ROOT,
    };
    let attr = Attr {
        kind: Kind::File,
        mode: 0o644,
        nlink: 1,
        size: 5,
        blocks: 8,
        parent: Ino(0),
        ..folder.clone()
    };
    let inline = |bytes: &[u8]| Value::Inline(bytes.to_vec()).encode();
    let entries = [
        (attr_key(ROOT), folder.encode()),
        (
            entry_key(ROOT, hash56(b"f"), b"f"),
            encode_entry(file, Kind::File),
        ),
        (attr_key(file), attr.encode()),
        (xattr_key(file, b"user.k"), inline(b"v")),
        (backref_key(file, ROOT, b"f"), Vec::new()),
        (content_key(file, 0), inline(b"hello")),
    ];
    let mut node = crate::tree::Node::new(0);
    assert!(entries.is_sorted());
    entries
        .iter()
        .for_each(|(key, value)| node.push(key, value));
    let root = crate::tree::NodeId::of(&node.encode());
    assert_format(
        "the root of a small volume",
        &root.0,
        "22fbc94dc6e0c124257deab861747031981fa3a2983fb6d7a12b56bfc1122395",
    );
}

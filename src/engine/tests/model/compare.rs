//! What a fork shows against what its model says.

use super::tree::{PAGE, Tree};
use super::*;
use crate::fs::Seek;

/// The pages of a file that are no holes.
pub fn data_pages(fs: &Fs, ino: Ino) -> BTreeSet<u64> {
    let mut pages = BTreeSet::new();
    let mut at = 0;
    loop {
        match fs.lseek(ino, at, Seek::Data) {
            Ok(from) => {
                at = fs.lseek(ino, from, Seek::Hole).unwrap();
                assert!(at > from && from % PAGE == 0);
                pages.extend(from / PAGE..at.div_ceil(PAGE));
            }
            Err(FsError::NoSuchOffset) => return pages,
            Err(error) => panic!("{error:?}"),
        }
    }
}

/// Compares all that a fork shows with its model, which then knows the times.
pub fn compare(fs: &Fs, tree: &mut Tree) {
    let now = i64::try_from(
        std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_nanos(),
    )
    .unwrap();
    let hour = 3_600_000_000_000;
    let mut blocks = 0;
    for ino in tree.nodes.keys().copied().collect::<Vec<_>>() {
        let (nlink, node) = (tree.nlink(ino), tree.nodes.get_mut(&ino).unwrap());
        let attr = fs
            .getattr(ino)
            .unwrap_or_else(|error| panic!("{ino:?} {node:?}: {error:?}"));
        let times = &mut node.times;
        for (known, is) in [
            (&mut times.access, attr.atime),
            (&mut times.content, attr.mtime),
            (&mut times.change, attr.ctime),
            (&mut times.made, attr.btime),
        ] {
            match known {
                Some(known) => assert_eq!(*known, is, "a time of {ino:?}: {attr:?}"),
                None => assert!(
                    (now - hour..=now).contains(&is),
                    "a time of {ino:?}: {attr:?}"
                ),
            }
            *known = Some(is);
        }
        let said = (
            node.kind,
            node.mode,
            node.uid,
            node.gid,
            node.rdev,
            nlink,
            node.bytes.len() as u64,
        );
        let shown = (
            attr.kind, attr.mode, attr.uid, attr.gid, attr.rdev, attr.nlink, attr.size,
        );
        assert_eq!(shown, said, "{ino:?}");
        assert_eq!(
            attr.blocks,
            node.data.len() as u64 * 8,
            "blocks of {ino:?}: {:?}",
            node.data
        );
        blocks += attr.blocks;
        match node.kind {
            Kind::File => {
                assert!(
                    fs.read(ino, 0, node.bytes.len() + 1).unwrap() == *node.bytes,
                    "content of {ino:?}"
                );
                assert_eq!(data_pages(fs, ino), node.data, "holes of {ino:?}");
            }
            Kind::Symlink => assert!(
                fs.readlink(ino).unwrap() == *node.bytes,
                "target of {ino:?}"
            ),
            Kind::Directory => compare_folder(fs, tree, ino),
            _ => {}
        }
        compare_xattrs(fs, tree, ino);
    }
    assert_eq!(
        fs.fork.holds(),
        (blocks, tree.nodes.len() as u64),
        "what is in use"
    );
    for ino in tree.gone.iter().rev().take(8) {
        assert!(
            matches!(fs.getattr(*ino), Err(FsError::Stale)),
            "{ino:?} is there again"
        );
    }
}

fn compare_folder(fs: &Fs, tree: &Tree, dir: Ino) {
    let node = &tree.nodes[&dir];
    let (mut shown, mut cookie) = (BTreeMap::new(), 0);
    // In pieces, as a kernel asks for them.
    loop {
        let mut room = 3;
        let before = cookie;
        fs.readdir(dir, cookie, |entry| {
            if room == 0 {
                return false;
            }
            (room, cookie) = (room - 1, entry.cookie);
            let twice = shown.insert(entry.name.to_vec(), (entry.ino, entry.kind));
            assert_eq!(twice, None, "listed twice");
            true
        })
        .unwrap();
        if cookie == before {
            break;
        }
    }
    let (here, above) = (shown.remove(&b"."[..]), shown.remove(&b".."[..]));
    assert_eq!(here, Some((dir, Kind::Directory)));
    assert_eq!(above, Some((node.parent, Kind::Directory)), "above {dir:?}");
    let said: BTreeMap<_, _> = node
        .entries
        .iter()
        .map(|(name, ino)| (name.clone(), (*ino, tree.nodes[ino].kind)))
        .collect();
    assert_eq!(shown, said, "entries of {dir:?}");
}

fn compare_xattrs(fs: &Fs, tree: &Tree, ino: Ino) {
    let node = &tree.nodes[&ino];
    let names: Vec<u8> = node
        .xattrs
        .keys()
        .flat_map(|name| [name, &b"\0"[..]].concat())
        .collect();
    assert_eq!(
        fs.listxattr(ME, ino).unwrap(),
        names,
        "attributes of {ino:?}"
    );
    for (name, value) in &node.xattrs {
        assert!(
            fs.getxattr(ino, name).unwrap() == *value,
            "{} of {ino:?}",
            name.escape_ascii()
        );
    }
}

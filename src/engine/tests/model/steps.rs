//! The steps of a run, as values that can be shrunk: each is done to a fork and to its model, which have to agree on the answer.

use std::mem::discriminant;

use proptest::prelude::*;

use super::compare::data_pages;
use super::tree::{ACCESS, At, CAPABILITY, DEFAULT, PAGE, Tree};
use super::*;
use crate::fs::{Allocate, SIZE_MAX};

/// Few names, so that they meet again; what no name may be among them.
const NAMES: [&[u8]; 6] = [
    b"a",
    b"b",
    b"c",
    b"d.tar.gz",
    b"\xff\xfe not text",
    &[b'x'; 255],
];
const BAD: [&[u8]; 5] = [b".", b"..", b"", b"a/b", &[b'x'; 256]];
const XATTRS: [&[u8]; 5] = [
    b"user.x",
    b"user.y",
    b"trusted.t",
    b"security.s",
    b"user.large",
];

type Answer<T> = std::result::Result<T, FsError>;

/// Numbers that choose among what there is when the step is done.
type Pick = u16;

/// A name somewhere: in which folder, and one that is there, or any.
#[derive(Clone, Copy, Debug)]
pub struct Spot {
    dir: Pick,
    name: Pick,
}

#[derive(Clone, Debug)]
pub enum Step {
    Make {
        at: Spot,
        kind: Kind,
        mode: u16,
        umask: u16,
        uid: u32,
        target: u16,
    },
    Remove {
        at: Spot,
        folder: Option<bool>,
    },
    Rename {
        from: Spot,
        to: Spot,
        mode: u8,
        uid: u32,
    },
    Link {
        node: Pick,
        at: Spot,
    },
    Write {
        node: Pick,
        offset: Option<u64>,
        len: u64,
        kill: bool,
    },
    Resize {
        node: Pick,
        size: u64,
        uid: u32,
    },
    Change {
        node: Pick,
        mode: Option<u16>,
        owner: Option<u32>,
        group: Option<u32>,
        times: [Option<i64>; 3],
    },
    Allocate {
        node: Pick,
        from: u64,
        len: u64,
        how: u8,
        uid: u32,
    },
    Copy {
        from: (Pick, u64),
        to: (Pick, u64),
        len: u64,
        uid: u32,
    },
    Set {
        node: Pick,
        name: u8,
        len: u16,
        how: u8,
    },
    Unset {
        node: Pick,
        name: u8,
    },
    Acl {
        node: Pick,
        default: bool,
        perms: Option<[u8; 5]>,
    },
    Lookup {
        at: Spot,
    },
    Forget {
        node: Pick,
    },
    /// Another of the forks goes on.
    Turn(u8),
    /// The kernel's mount goes.
    EndSession,
    Commit {
        keep: bool,
    },
    /// A fork of the head follows, or of the version that this chooses.
    Abandon(Option<Pick>),
    Move,
    Restart,
    Gc,
}

/// Places and lengths around the edges of pages; sometimes beyond what is one chunk.
fn bytes() -> impl Strategy<Value = u64> {
    let pages = prop_oneof![6 => 0_u64..4, 3 => 0_u64..12, 1 => 0_u64..90];
    let beside = prop_oneof![3 => Just(0), 1 => Just(1), 1 => Just(PAGE - 1), 3 => 0..PAGE];
    (pages, beside).prop_map(|(pages, beside)| pages * PAGE + beside)
}

pub fn steps() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec(step(), 60..240)
}

fn step() -> impl Strategy<Value = Step> {
    let pick = any::<Pick>;
    let spot = || (pick(), pick()).prop_map(|(dir, name)| Spot { dir, name });
    let uid = || prop_oneof![3 => Just(0_u32), 1 => Just(1000)];
    let mode = || prop_oneof![4 => 0_u16..0o1000, 1 => 0_u16..0o10000];
    let kind = prop_oneof![
        8 => Just(Kind::File),
        6 => Just(Kind::Directory),
        2 => Just(Kind::Symlink),
        1 => prop::sample::select(vec![Kind::Fifo, Kind::CharDevice, Kind::BlockDevice, Kind::Socket]),
    ];
    let umask = prop::sample::select(vec![0_u16, 0o022, 0o077]);
    let some = |strategy| prop::option::weighted(0.3, strategy);
    let time = -4_000_000_000_000_000_000_i64..4_000_000_000_000_000_000;
    prop_oneof![
        16 => (spot(), kind, mode(), umask, uid(), 0_u16..5000).prop_map(|(at, kind, mode, umask, uid, target)| {
            Step::Make { at, kind, mode, umask, uid, target }
        }),
        9 => (spot(), prop::option::weighted(0.1, any::<bool>())).prop_map(|(at, folder)| Step::Remove { at, folder }),
        12 => (spot(), spot(), 0_u8..8, uid()).prop_map(|(from, to, mode, uid)| Step::Rename { from, to, mode, uid }),
        6 => (pick(), spot()).prop_map(|(node, at)| Step::Link { node, at }),
        18 => (pick(), prop::option::weighted(0.85, bytes()), bytes(), any::<bool>())
            .prop_map(|(node, offset, len, kill)| Step::Write { node, offset, len, kill }),
        6 => (pick(), prop_oneof![20 => bytes(), 1 => Just(SIZE_MAX + 1)], uid())
            .prop_map(|(node, size, uid)| Step::Resize { node, size, uid }),
        5 => (pick(), some(0_u16..0o10000), prop::option::of(0_u32..3), prop::option::of(0_u32..3), prop::array::uniform3(prop::option::weighted(0.3, time)))
            .prop_map(|(node, mode, owner, group, times)| Step::Change { node, mode, owner, group, times }),
        9 => (pick(), bytes(), bytes(), 0_u8..5, uid()).prop_map(|(node, from, len, how, uid)| Step::Allocate { node, from, len, how, uid }),
        9 => ((pick(), bytes()), (pick(), bytes()), bytes(), uid()).prop_map(|(from, to, len, uid)| Step::Copy { from, to, len, uid }),
        6 => (pick(), 0_u8..8, 0_u16..6000, 0_u8..4).prop_map(|(node, name, len, how)| Step::Set { node, name, len, how }),
        3 => (pick(), 0_u8..10).prop_map(|(node, name)| Step::Unset { node, name }),
        4 => (pick(), any::<bool>(), prop::option::weighted(0.8, prop::array::uniform5(0_u8..8)))
            .prop_map(|(node, default, perms)| Step::Acl { node, default, perms }),
        4 => spot().prop_map(|at| Step::Lookup { at }),
        6 => pick().prop_map(|node| Step::Forget { node }),
        6 => any::<u8>().prop_map(Step::Turn),
        2 => Just(Step::EndSession),
        7 => prop::bool::weighted(0.6).prop_map(|keep| Step::Commit { keep }),
        1 => prop::option::of(pick()).prop_map(Step::Abandon),
        3 => Just(Step::Move),
        2 => Just(Step::Restart),
        2 => Just(Step::Gc),
    ]
}

/// The inode that a number chooses: mostly one that there is, files twice as often, sometimes one that is gone.
fn node(tree: &Tree, pick: Pick) -> Ino {
    if pick % 64 == 63 && !tree.gone.is_empty() {
        return tree.gone[usize::from(pick) % tree.gone.len()];
    }
    let files = tree.nodes.iter().filter(|node| node.1.kind == Kind::File);
    let all: Vec<Ino> = tree
        .nodes
        .keys()
        .chain(files.map(|node| node.0))
        .copied()
        .collect();
    all[usize::from(pick / 2) % all.len()]
}

fn file(tree: &Tree, pick: Pick) -> Ino {
    let files = tree.nodes.iter().filter(|node| node.1.kind == Kind::File);
    let files: Vec<Ino> = files.map(|node| *node.0).collect();
    if pick % 16 == 15 || files.is_empty() {
        return node(tree, pick);
    }
    files[usize::from(pick) % files.len()]
}

fn place(tree: &Tree, spot: Spot) -> (Ino, Vec<u8>) {
    let dirs = tree.nodes.iter().filter(|node| node.1.is_dir());
    let dirs: Vec<Ino> = dirs.map(|node| *node.0).collect();
    let dir = match spot.dir {
        pick if pick % 32 == 31 => node(tree, pick / 32),
        pick => dirs[usize::from(pick) % dirs.len()],
    };
    let pick = usize::from(spot.name / 4);
    let there = tree.nodes.get(&dir).map(|node| &node.entries);
    let name = match (spot.name % 4, there) {
        (2 | 3, Some(there)) if !there.is_empty() => {
            let name = there.keys().nth(pick % there.len());
            return (dir, name.unwrap().clone());
        }
        (1, _) if pick % 16 == 0 => BAD[pick / 16 % BAD.len()],
        _ => NAMES[pick % NAMES.len()],
    };
    (dir, name.to_vec())
}

fn caller(uid: u32) -> Caller {
    Caller {
        uid,
        gid: uid,
        ..ME
    }
}

/// Whether the fork answers as the model does; true if both did it.
fn agree<A, B>(step: &Step, said: &Answer<A>, got: &Answer<B>) -> bool {
    match (said, got) {
        (Ok(_), Ok(_)) => true,
        (Err(a), Err(b)) if discriminant(a) == discriminant(b) => false,
        (Err(a), Err(b)) => panic!("{step:?}: {b:?} instead of {a:?}"),
        (Ok(_), Err(b)) => panic!("{step:?} was refused: {b:?}"),
        (Err(a), Ok(_)) => panic!("{step:?} was done, and not refused: {a:?}"),
    }
}

/// Does a step that concerns one fork alone.
pub fn work(fs: &Fs, tree: &mut Tree, step: &Step) {
    match *step {
        Step::Make {
            at,
            kind,
            mode,
            umask,
            uid,
            target,
        } => {
            let (dir, name) = place(tree, at);
            let path = noise(usize::from(target), 3);
            let mut new = NewNode {
                umask,
                rdev: 0x0102_0003,
                ..NewNode::new(kind, mode)
            };
            if kind == Kind::Symlink {
                new.target = &path;
            }
            let said = tree.may_make((dir, &name), &new);
            let got = fs.make(caller(uid), dir, &name, new);
            if agree(step, &said, &got) {
                let ino = got.unwrap().ino;
                tree.make(uid, (dir, &name), &new, ino);
                tree.told(ino);
            }
        }
        Step::Remove { at, folder } => {
            let (dir, name) = place(tree, at);
            let is_dir = tree
                .find((dir, &name))
                .is_some_and(|ino| tree.nodes[&ino].is_dir());
            let folder = folder.unwrap_or(is_dir);
            let said = tree.remove((dir, &name), folder);
            let got = if folder {
                fs.rmdir(ME, dir, &name)
            } else {
                fs.unlink(ME, dir, &name)
            };
            agree(step, &said, &got);
        }
        Step::Rename {
            from,
            to,
            mode,
            uid,
        } => rename(
            fs,
            tree,
            step,
            place(tree, from),
            place(tree, to),
            mode,
            uid,
        ),
        Step::Link { node: pick, at } => {
            let (ino, (dir, name)) = (node(tree, pick), place(tree, at));
            let said = tree.link(ino, (dir, &name));
            agree(step, &said, &fs.link(ME, ino, dir, &name));
        }
        Step::Write {
            node: pick,
            offset,
            len,
            kill,
        } => {
            let ino = file(tree, pick);
            let data = noise(len.max(1) as usize, u64::from(pick) + 1);
            let said = tree.write(ino, offset, &data, kill);
            let got = match offset {
                Some(offset) => fs.write(ME, ino, offset, &data, kill),
                None => fs.append(ME, ino, &data, kill),
            };
            if agree(step, &said, &got) {
                assert_eq!(got.unwrap(), data.len());
            }
        }
        Step::Resize {
            node: pick,
            size,
            uid,
        } => {
            let set = SetAttr {
                size: Some(size),
                ..SetAttr::default()
            };
            let ino = file(tree, pick);
            agree(
                step,
                &tree.setattr(uid, ino, set),
                &fs.setattr(caller(uid), ino, set),
            );
        }
        Step::Change {
            node: pick,
            mode,
            owner,
            group,
            times: [atime, mtime, ctime],
        } => {
            let ino = node(tree, pick);
            let set = SetAttr {
                mode,
                uid: owner,
                gid: group,
                size: None,
                atime,
                mtime,
                ctime,
            };
            agree(step, &tree.setattr(0, ino, set), &fs.setattr(ME, ino, set));
        }
        Step::Allocate {
            node: pick,
            from,
            len,
            how,
            uid,
        } => {
            let ino = file(tree, pick);
            let how = match how {
                0 => Allocate::Reserve { keep_size: false },
                1 => Allocate::Reserve { keep_size: true },
                2 => Allocate::Zero { keep_size: false },
                3 => Allocate::Zero { keep_size: true },
                _ => Allocate::Punch,
            };
            let said = tree.allocate(uid, ino, (from, len), how);
            agree(step, &said, &fs.fallocate(caller(uid), ino, from, len, how));
        }
        Step::Copy { from, to, len, uid } => {
            let (from, to) = ((file(tree, from.0), from.1), (file(tree, to.0), to.1));
            let said = tree.may_copy(from, to, len);
            let got = fs.copy_range(caller(uid), from, to, len);
            if agree(step, &said, &got) {
                let (most, done) = (said.unwrap(), got.unwrap());
                assert!(done <= most && (done > 0) == (most > 0), "{done} of {most}");
                if done > 0 {
                    tree.copy(uid, from, to, done, &data_pages(fs, to.0));
                }
            }
        }
        Step::Set {
            node: pick,
            name,
            len,
            how,
        } => {
            let how = [
                XattrMode::Any,
                XattrMode::Create,
                XattrMode::Replace,
                XattrMode::CreateReplace,
            ][usize::from(how)];
            let (ino, name) = (node(tree, pick), xattr(tree, pick, name));
            let len = if name == b"user.large" {
                60_000 + usize::from(len)
            } else {
                usize::from(len)
            };
            let value = noise(len, 9);
            let said = tree.setxattr(ino, name, &value, how);
            agree(step, &said, &fs.setxattr(ME, ino, name, &value, how));
        }
        Step::Unset { node: pick, name } => {
            let (ino, name) = (node(tree, pick), xattr(tree, pick, name));
            agree(
                step,
                &tree.removexattr(ino, name),
                &fs.removexattr(ME, ino, name),
            );
        }
        Step::Acl {
            node: pick,
            default,
            perms,
        } => {
            let (ino, name) = (node(tree, pick), if default { DEFAULT } else { ACCESS });
            let value = acl(pick, perms);
            let said = tree.setxattr(ino, name, &value, XattrMode::Any);
            agree(
                step,
                &said,
                &fs.setxattr(ME, ino, name, &value, XattrMode::Any),
            );
        }
        Step::Lookup { at } => {
            let (dir, name) = place(tree, at);
            let said = match tree.find((dir, &name)) {
                _ if name.len() > 255 => Err(FsError::NameTooLong),
                _ if name == b"." || name == b".." => return,
                found => Ok(found),
            };
            let got = fs.lookup(dir, &name);
            if agree(step, &said, &got) {
                let found = got.unwrap().map(|entry| entry.ino);
                assert_eq!(found, said.unwrap());
                found.into_iter().for_each(|ino| tree.told(ino));
            }
        }
        Step::Forget { node: pick } => {
            let known: Vec<Ino> = tree.known.keys().copied().collect();
            if !known.is_empty() {
                let ino = known[usize::from(pick) % known.len()];
                let times = if pick & 1 == 0 { tree.known[&ino] } else { 1 };
                tree.forget(ino, times);
                fs.forget(ino, times);
            }
        }
        Step::EndSession => {
            tree.end_session();
            fs.fork.end_session(0);
        }
        _ => unreachable!("{step:?} concerns the volume"),
    }
}

fn rename(
    fs: &Fs,
    tree: &mut Tree,
    step: &Step,
    old: (Ino, Vec<u8>),
    new: (Ino, Vec<u8>),
    mode: u8,
    uid: u32,
) {
    let mode = match mode {
        0..=2 => RenameMode::Replace,
        3 => RenameMode::NoReplace,
        4 | 5 => RenameMode::Exchange,
        6 => RenameMode::Whiteout,
        _ => RenameMode::WhiteoutNoReplace,
    };
    let (from, to): (At, At) = ((old.0, &old.1), (new.0, &new.1));
    let said = tree.may_rename(from, to, mode);
    let got = fs.rename(caller(uid), from, to, mode);
    if agree(step, &said, &got) {
        let mut white = None;
        let same = tree.find(from) == tree.find(to);
        if !same && matches!(mode, RenameMode::Whiteout | RenameMode::WhiteoutNoReplace) {
            let entry = fs.lookup(from.0, from.1).unwrap().expect("a whiteout");
            tree.told(entry.ino);
            white = Some(entry.ino);
        }
        tree.rename(uid, from, to, mode, white);
    }
}

/// The name of an extended attribute; a capability only where it may be, on a file.
fn xattr(tree: &Tree, pick: Pick, name: u8) -> &'static [u8] {
    let is_file = |ino| {
        tree.nodes
            .get(&ino)
            .is_some_and(|node| node.kind == Kind::File)
    };
    match usize::from(name) {
        5 if is_file(node(tree, pick)) => CAPABILITY,
        6 => b"system.unknown",
        7 => b"user.",
        8 => ACCESS,
        9 => DEFAULT,
        at => XATTRS[at % XATTRS.len()],
    }
}

/// An ACL in the kernel's form: one that says more than a mode where `pick` is even; an empty one, or none at all, without `perms`.
fn acl(pick: Pick, perms: Option<[u8; 5]>) -> Vec<u8> {
    let mut out = vec![2, 0, 0, 0];
    match perms {
        Some([user, named, group, mask, other]) => {
            let entries = [
                (1, user, u32::MAX),
                (2, named, 1000),
                (4, group, u32::MAX),
                (16, mask, u32::MAX),
                (32, other, u32::MAX),
            ];
            for (tag, perm, id) in entries {
                if pick.is_multiple_of(2) || !matches!(tag, 2 | 16) {
                    out.extend([tag, 0, perm, 0]);
                    out.extend(u32::to_le_bytes(id));
                }
            }
        }
        None if pick.is_multiple_of(4) => out[0] = 1,
        None => {}
    }
    out
}

//! What a fork is to show, as maps and nothing else: which requests are refused and with what, and what the others change.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::xattr::{grant, is_minimal, stands_for};
use crate::fork::error::FsError;
use crate::fs::{Allocate, NewNode, RenameMode, SetAttr};
use crate::record::{Ino, Kind, Nanos, ROOT};

pub const PAGE: u64 = 4096;
pub const CAPABILITY: &[u8] = b"security.capability";
pub const ACCESS: &[u8] = b"system.posix_acl_access";
pub const DEFAULT: &[u8] = b"system.posix_acl_default";

pub type Said = Result<(), FsError>;
/// A name in a folder.
pub type At<'a> = (Ino, &'a [u8]);
/// A place in a file.
pub type At64 = (Ino, u64);

/// Access, modification, change and creation; None where something changed it since it was last seen.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Times {
    pub access: Option<Nanos>,
    pub content: Option<Nanos>,
    pub change: Option<Nanos>,
    pub made: Option<Nanos>,
}

/// An inode of any kind.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    pub kind: Kind,
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u32,
    pub times: Times,
    /// How many entries name it.
    pub names: u32,
    /// The folder that a folder is in.
    pub parent: Ino,
    pub entries: BTreeMap<Vec<u8>, Ino>,
    /// What a file holds, or where a symbolic link leads.
    pub bytes: Arc<Vec<u8>>,
    /// The pages of it that are no holes.
    pub data: BTreeSet<u64>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Node {
    pub fn new(kind: Kind, mode: u16) -> Node {
        Node {
            kind,
            mode,
            uid: 0,
            gid: 0,
            rdev: 0,
            times: Times::default(),
            names: 1,
            parent: Ino(0),
            entries: BTreeMap::new(),
            bytes: Arc::default(),
            data: BTreeSet::new(),
            xattrs: BTreeMap::new(),
        }
    }

    pub fn is_dir(&self) -> bool {
        self.kind == Kind::Directory
    }

    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn resize(&mut self, size: u64) {
        Arc::make_mut(&mut self.bytes).resize(size as usize, 0);
        self.data = self.data.range(..size.div_ceil(PAGE)).copied().collect();
    }

    fn lose_suidgid(&mut self) {
        self.mode &= !0o4000;
        if self.mode & 0o010 != 0 {
            self.mode &= !0o2000;
        }
    }

    pub fn touch(&mut self, content: bool) {
        self.times.change = None;
        if content {
            self.times.content = None;
        }
    }

    /// The same but for the times of a folder.
    fn is_like(&self, other: &Node) -> bool {
        let times = if self.is_dir() { other } else { self }.times;
        let same = Node {
            times,
            ..self.clone()
        };
        same == *other
    }
}

/// Everything that a fork shows, and what its kernel was told of.
#[derive(Clone, Debug)]
pub struct Tree {
    pub nodes: BTreeMap<Ino, Node>,
    /// How often the kernel was told of an inode.
    pub known: BTreeMap<Ino, u64>,
    pub gone: Vec<Ino>,
    pub acl: bool,
}

impl Tree {
    pub fn new(acl: bool) -> Tree {
        let mut root = Node::new(Kind::Directory, 0o755);
        root.parent = ROOT;
        Tree {
            nodes: BTreeMap::from([(ROOT, root)]),
            known: BTreeMap::new(),
            gone: Vec::new(),
            acl,
        }
    }

    /// What a commit makes of it: all that has a name.
    pub fn committed(&self) -> Tree {
        let mut version = self.clone();
        version.end_session();
        version.gone.clear();
        version
    }

    /// Whether a commit of it onto `base` has nothing to say.
    pub fn is_like(&self, base: &Tree) -> bool {
        let version = self.committed();
        version.nodes.len() == base.nodes.len()
            && version
                .nodes
                .iter()
                .zip(&base.nodes)
                .all(|(a, b)| a.0 == b.0 && a.1.is_like(b.1))
    }

    pub fn nlink(&self, ino: Ino) -> u32 {
        let node = &self.nodes[&ino];
        if !node.is_dir() || node.names == 0 {
            return node.names;
        }
        let folders = node.entries.values().filter(|at| self.nodes[at].is_dir());
        2 + folders.count() as u32
    }

    pub fn get(&self, ino: Ino) -> Result<&Node, FsError> {
        self.nodes.get(&ino).ok_or(FsError::Stale)
    }

    pub fn node(&mut self, ino: Ino) -> &mut Node {
        self.nodes.get_mut(&ino).unwrap()
    }

    pub fn find(&self, (dir, name): At) -> Option<Ino> {
        self.nodes.get(&dir)?.entries.get(name).copied()
    }

    pub fn told(&mut self, ino: Ino) {
        *self.known.entry(ino).or_default() += 1;
    }

    pub fn forget(&mut self, ino: Ino, times: u64) {
        if let Some(count) = self.known.get_mut(&ino) {
            *count = count.saturating_sub(times);
            if *count == 0 {
                self.known.remove(&ino);
                self.drop_orphan(ino);
            }
        }
    }

    pub fn end_session(&mut self) {
        self.known.clear();
        for ino in self.nodes.keys().copied().collect::<Vec<_>>() {
            self.drop_orphan(ino);
        }
    }

    fn drop_orphan(&mut self, ino: Ino) {
        if self.nodes.get(&ino).is_some_and(|node| node.names == 0)
            && !self.known.contains_key(&ino)
        {
            self.nodes.remove(&ino);
            self.gone.push(ino);
        }
    }

    fn check_name(name: &[u8]) -> Said {
        match name {
            _ if name.len() > 255 => Err(FsError::NameTooLong),
            b"" | b"." | b".." => Err(FsError::Invalid),
            _ if name.contains(&b'/') || name.contains(&0) => Err(FsError::Invalid),
            _ => Ok(()),
        }
    }

    fn is_free(&self, (dir, name): At) -> Said {
        let folder = self.get(dir)?;
        if !folder.is_dir() {
            Err(FsError::NotDirectory)
        } else if folder.names == 0 {
            Err(FsError::NotFound)
        } else if folder.entries.contains_key(name) {
            Err(FsError::Exists)
        } else {
            Ok(())
        }
    }

    pub fn may_make(&self, at: At, new: &NewNode<'_>) -> Said {
        Self::check_name(at.1)?;
        if new.kind == Kind::Symlink && new.target.len() > 4095 {
            return Err(FsError::NameTooLong);
        }
        self.is_free(at)
    }

    pub fn make(&mut self, uid: u32, (dir, name): At, new: &NewNode<'_>, ino: Ino) {
        assert!(
            !self.nodes.contains_key(&ino),
            "{ino:?} was handed out twice"
        );
        let parent = self.node(dir);
        let mut node = Node::new(new.kind, new.mode & !new.umask);
        (node.uid, node.gid) = (uid, uid);
        let default = parent.xattrs.get(DEFAULT).cloned();
        match default {
            _ if new.kind == Kind::Symlink => node.mode = 0o777,
            Some(mut acl) => {
                if new.kind == Kind::Directory {
                    node.xattrs.insert(DEFAULT.into(), acl.clone());
                }
                grant(&mut acl, |perm, bits| perm & bits, new.mode);
                node.mode = new.mode & 0o7000 | stands_for(&acl);
                if !is_minimal(&acl) {
                    node.xattrs.insert(ACCESS.into(), acl);
                }
            }
            None => {}
        }
        if parent.mode & 0o2000 != 0 {
            node.gid = parent.gid;
            if node.is_dir() {
                node.mode |= 0o2000;
            }
        }
        if matches!(new.kind, Kind::CharDevice | Kind::BlockDevice) {
            node.rdev = new.rdev;
        }
        if node.is_dir() {
            node.parent = dir;
        }
        if !new.target.is_empty() {
            node.bytes = Arc::new(new.target.into());
            node.data = BTreeSet::from([0]);
        }
        parent.entries.insert(name.into(), ino);
        parent.touch(true);
        self.nodes.insert(ino, node);
    }

    pub fn link(&mut self, ino: Ino, (dir, name): At) -> Said {
        Self::check_name(name)?;
        self.is_free((dir, name))?;
        let node = self.get(ino)?;
        if node.is_dir() {
            return Err(FsError::NotPermitted);
        }
        if node.names == 0 {
            return Err(FsError::NotFound);
        }
        let node = self.node(ino);
        node.names += 1;
        node.touch(false);
        let folder = self.node(dir);
        folder.entries.insert(name.into(), ino);
        folder.touch(true);
        self.told(ino);
        Ok(())
    }

    pub fn remove(&mut self, (dir, name): At, folder: bool) -> Said {
        Self::check_name(name)?;
        let ino = self.find((dir, name)).ok_or(FsError::NotFound)?;
        let node = &self.nodes[&ino];
        match (node.is_dir(), folder) {
            (true, false) => return Err(FsError::IsDirectory),
            (false, true) => return Err(FsError::NotDirectory),
            _ if !node.entries.is_empty() => return Err(FsError::NotEmpty),
            _ => {}
        }
        self.lose((dir, name));
        self.drop_orphan(ino);
        Ok(())
    }

    fn lose(&mut self, (dir, name): At) {
        let folder = self.node(dir);
        folder.touch(true);
        let ino = folder.entries.remove(name).unwrap();
        let node = self.node(ino);
        node.names -= 1;
        node.touch(false);
    }

    fn put(&mut self, (dir, name): At, ino: Ino) {
        let folder = self.node(dir);
        folder.touch(true);
        folder.entries.insert(name.into(), ino);
        let node = self.node(ino);
        node.names += 1;
        node.touch(false);
        if node.is_dir() {
            node.parent = dir;
        }
    }

    /// Whether a folder is `dir` or above it.
    fn is_above(&self, ino: Ino, mut dir: Ino) -> bool {
        while dir != ino && dir != ROOT {
            dir = self.nodes.get(&dir).map_or(ROOT, |node| node.parent);
        }
        dir == ino
    }

    pub fn may_rename(&self, old: At, new: At, mode: RenameMode) -> Said {
        Self::check_name(old.1)?;
        Self::check_name(new.1)?;
        let source = self.find(old).ok_or(FsError::NotFound)?;
        let target = self.find(new);
        let no_replace = matches!(mode, RenameMode::NoReplace | RenameMode::WhiteoutNoReplace);
        match target {
            Some(_) if no_replace => return Err(FsError::Exists),
            None if mode == RenameMode::Exchange => return Err(FsError::NotFound),
            Some(target) if target == source => return Ok(()),
            _ => {}
        }
        if self.nodes.get(&new.0).is_none_or(|node| node.names == 0) {
            return Err(FsError::NotFound);
        }
        let moves_dir = self.nodes[&source].is_dir();
        if moves_dir && self.is_above(source, new.0) {
            return Err(FsError::Invalid);
        }
        let Some(target) = target else {
            return self.is_free(new);
        };
        let other = &self.nodes[&target];
        if mode == RenameMode::Exchange {
            return if other.is_dir() && self.is_above(target, old.0) {
                Err(FsError::Invalid)
            } else {
                Ok(())
            };
        }
        match (moves_dir, other.is_dir()) {
            (false, true) => Err(FsError::IsDirectory),
            (true, false) => Err(FsError::NotDirectory),
            _ if !other.entries.is_empty() => Err(FsError::NotEmpty),
            _ => Ok(()),
        }
    }

    /// `white` is what stands under the old name afterwards, if the mode asks for it.
    pub fn rename(&mut self, uid: u32, old: At, new: At, mode: RenameMode, white: Option<Ino>) {
        let source = self.find(old).unwrap();
        let target = self.find(new);
        if target == Some(source) {
            return;
        }
        self.lose(old);
        if let Some(target) = target {
            self.lose(new);
            if mode == RenameMode::Exchange {
                self.put(old, target);
            }
        }
        self.put(new, source);
        target
            .into_iter()
            .for_each(|target| self.drop_orphan(target));
        if matches!(mode, RenameMode::Whiteout | RenameMode::WhiteoutNoReplace) {
            let white = white.expect("a whiteout");
            self.make(uid, old, &NewNode::new(Kind::CharDevice, 0), white);
        }
    }

    fn file(&mut self, ino: Ino, other: FsError) -> Result<&mut Node, FsError> {
        self.get(ino)?;
        let node = self.node(ino);
        match node.kind {
            Kind::File => Ok(node),
            Kind::Directory if !matches!(other, FsError::Invalid) => Err(FsError::IsDirectory),
            _ => Err(other),
        }
    }

    pub fn write(&mut self, ino: Ino, offset: Option<u64>, data: &[u8], kill: bool) -> Said {
        let node = self.file(ino, FsError::Invalid)?;
        let offset = offset.unwrap_or(node.size());
        let end = offset + data.len() as u64;
        node.resize(node.size().max(end));
        let bytes = Arc::make_mut(&mut node.bytes);
        bytes[offset as usize..end as usize].copy_from_slice(data);
        node.data.extend(offset / PAGE..end.div_ceil(PAGE));
        node.touch(true);
        node.xattrs.remove(CAPABILITY);
        if kill {
            node.lose_suidgid();
        }
        Ok(())
    }

    pub fn setattr(&mut self, uid: u32, ino: Ino, set: SetAttr) -> Said {
        if let Some(size) = set.size {
            if size > crate::fs::SIZE_MAX {
                return Err(FsError::TooLarge);
            }
            match self.get(ino)?.kind {
                Kind::File => {}
                Kind::Directory => return Err(FsError::IsDirectory),
                _ => return Err(FsError::Invalid),
            }
            let node = self.node(ino);
            node.resize(size);
            node.touch(true);
            if uid != 0 {
                node.lose_suidgid();
            }
        }
        self.get(ino)?;
        let node = self.node(ino);
        let takes_rights = set.uid.is_some() || set.gid.is_some() || set == SetAttr::default();
        if set.size.is_some() || takes_rights {
            node.xattrs.remove(CAPABILITY);
        }
        if let Some(mode) = set.mode {
            node.mode = mode & 0o7777;
            if let Some(acl) = node.xattrs.get_mut(ACCESS) {
                grant(acl, |_, bits| bits, mode);
            }
        }
        (node.uid, node.gid) = (set.uid.unwrap_or(node.uid), set.gid.unwrap_or(node.gid));
        if takes_rights && !node.is_dir() && set.mode.is_none() {
            node.lose_suidgid();
        }
        node.times.access = set.atime.or(node.times.access);
        node.times.content = set.mtime.or(node.times.content);
        node.times.change = set.ctime;
        Ok(())
    }

    pub fn allocate(&mut self, uid: u32, ino: Ino, (from, len): (u64, u64), how: Allocate) -> Said {
        if len == 0 {
            return Err(FsError::Invalid);
        }
        let node = self.file(ino, FsError::NotSupported)?;
        let end = from + len;
        let grows = match how {
            Allocate::Reserve { keep_size } | Allocate::Zero { keep_size } => !keep_size,
            Allocate::Punch => false,
        };
        if grows {
            node.resize(node.size().max(end));
        }
        if !matches!(how, Allocate::Reserve { .. }) {
            let size = node.size();
            let to = end.min(size);
            if from < to {
                Arc::make_mut(&mut node.bytes)[from as usize..to as usize].fill(0);
            }
            // Pages that are zeroed in part keep their data, and the last one of the file is whole where the file ends.
            let last = if end >= size { u64::MAX } else { end / PAGE };
            let whole = from.div_ceil(PAGE)..last;
            node.data.retain(|page| !whole.contains(page));
        }
        node.touch(true);
        node.xattrs.remove(CAPABILITY);
        if uid != 0 {
            node.lose_suidgid();
        }
        Ok(())
    }

    /// How much a copy has to copy.
    pub fn may_copy(&self, source: At64, target: At64, len: u64) -> Result<u64, FsError> {
        let a = self.get(source.0)?;
        if a.kind != Kind::File || self.get(target.0)?.kind != Kind::File {
            return Err(FsError::Invalid);
        }
        let len = len.min(a.size().saturating_sub(source.1));
        let apart = source.1 >= target.1 + len || target.1 >= source.1 + len;
        if len > 0 && source.0 == target.0 && !apart {
            return Err(FsError::Invalid);
        }
        Ok(len)
    }

    /// `runs` are the pages that the target has afterwards: those of the source where it shares them, or all that were written.
    pub fn copy(&mut self, uid: u32, source: At64, target: At64, done: u64, runs: &BTreeSet<u64>) {
        let from = self.nodes[&source.0].clone();
        let bytes = &from.bytes[source.1 as usize..(source.1 + done) as usize];
        let (first, last) = (target.1 / PAGE, (target.1 + done).div_ceil(PAGE));
        self.write(target.0, Some(target.1), bytes, uid != 0)
            .unwrap();
        let node = self.node(target.0);
        if *runs != node.data {
            assert!(
                source.1.is_multiple_of(PAGE) && target.1.is_multiple_of(PAGE),
                "holes of a copy that is not aligned"
            );
            node.data.retain(|page| !(first..last).contains(page));
            let shared = from
                .data
                .range(source.1 / PAGE..(source.1 + done).div_ceil(PAGE));
            node.data
                .extend(shared.map(|page| page - source.1 / PAGE + first));
        }
    }
}

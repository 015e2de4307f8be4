//! Reading versions without a mount: ls, cat, diff; and looking after the store: stats, gc, check.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::ops::Range;

use super::{Code, Engine, EngineError, Result};
use crate::fork::view;
use crate::record::{self, Attr, Ino, Key, Kind, ROOT};
use crate::store::{CheckReport, ForkId, Lease, Paths, Stats};
use crate::tree::{self, NodeId};

/// The longest target of a symbolic link, as the kernel has it.
const LINK_MAX: u64 = 4095;

/// An entry of a directory of a version.
#[derive(Clone, PartialEq, Debug)]
pub struct ListEntry {
    pub name: Vec<u8>,
    pub ino: u64,
    /// st_mode, with the type.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    /// Nanoseconds since 1970.
    pub mtime: i64,
    pub nlink: u32,
    /// Of a symbolic link.
    pub target: Option<Vec<u8>>,
}

/// How a path differs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum DiffKind {
    Added,
    Removed,
    Changed,
    Renamed,
}

/// A path that differs between two versions.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiffEntry {
    pub kind: DiffKind,
    pub path: Vec<u8>,
    /// The old path of what was renamed.
    pub from: Option<Vec<u8>>,
    pub old_size: u64,
    pub new_size: u64,
}

/// A root that is read, and what keeps it.
pub(super) struct Held {
    pub root: NodeId,
    _lease: Lease,
}

/// Whether a text is meant for the id of a fork.
fn names_fork(text: &str) -> bool {
    text.parse::<ForkId>().is_ok()
}

impl Engine {
    /// The root of a version.
    pub(super) fn hold(&self, text: &str) -> Result<Held> {
        let _stays = self.bases.read();
        let (_, version) = self.find_version(text)?;
        Ok(Held {
            root: version.root,
            _lease: self.store.lease(version.root),
        })
    }

    /// What a text names: a version by its volume and number, a fork by its id.
    pub fn whole_name(&self, text: String) -> Result<String> {
        if names_fork(&text) {
            return Ok(text);
        }
        let (volume, version) = self.find_version(&text)?;
        Ok(format!("{}@{}", volume.name, version.number))
    }

    /// The root of a version, or of a fork as it is now.
    fn hold_any(&self, text: &str) -> Result<Held> {
        if !names_fork(text) {
            return self.hold(text);
        }
        let id = text.parse().map_err(|()| super::no_fork(text))?;
        let live = self.live(id)?;
        let _one = live.alone();
        let prepared = crate::commit::prepare(live.fork()?, true, self.config.threads)?;
        let root = prepared.root;
        let lease = self.store.lease(root);
        // The edits go back into the fork; what was ingested stays for as long as it is read, and is garbage then.
        prepared.fork.thaw();
        self.store
            .publish(&[prepared.ingest], crate::store::Publish::default())?;
        Ok(Held {
            root,
            _lease: lease,
        })
    }

    fn attr(&self, root: NodeId, ino: Ino) -> Result<Attr> {
        view::base_attr(&self.store, root, ino)?.ok_or_else(|| {
            EngineError::new(Code::Damaged, format!("inode {ino} has no attributes"))
        })
    }

    /// Finds the inode at a path.
    fn walk(&self, root: NodeId, path: &[u8]) -> Result<Option<Ino>> {
        if root == tree::empty().0 {
            return Ok(None);
        }
        let mut at = ROOT;
        for part in path
            .split(|b| *b == b'/')
            .filter(|part| !part.is_empty() && *part != b".")
        {
            match view::base_entry(&self.store, root, at, record::hash56(part), part)? {
                Some((child, _)) => at = child,
                None => return Ok(None),
            }
        }
        Ok(Some(at))
    }

    fn at(&self, text: &str, path: &[u8], held: &Held) -> Result<Ino> {
        let path_text = String::from_utf8_lossy(path).into_owned();
        self.walk(held.root, path)?
            .ok_or_else(|| EngineError::new(Code::NotFound, format!("{text} has no {path_text}")))
    }

    pub(super) fn children(
        &self,
        root: NodeId,
        dir: Ino,
    ) -> Result<BTreeMap<Vec<u8>, (Ino, Kind)>> {
        let mut out = BTreeMap::new();
        for item in tree::prefix(&*self.store, root, &record::entries_prefix(dir)) {
            let (key, value) = item?;
            let (Some(Key::Entry { name, .. }), Some(child)) =
                (Key::parse(&key), record::decode_entry(&value))
            else {
                let message = format!("an entry of folder {dir} cannot be read");
                return Err(EngineError::new(Code::Damaged, message));
            };
            out.insert(name.to_vec(), child);
        }
        Ok(out)
    }

    /// Returns the target of a symbolic link.
    pub(super) fn target(&self, root: NodeId, ino: Ino, size: u64) -> Result<Vec<u8>> {
        if size > LINK_MAX {
            let message = format!("the link of inode {ino} is longer than any can be");
            return Err(EngineError::new(Code::Damaged, message));
        }
        let mut bytes = vec![0; size as usize];
        view::read_base(&self.store, root, ino, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// Lists a directory of a version, or the one file that is there.
    pub fn ls(&self, text: &str, path: &[u8]) -> Result<Vec<ListEntry>> {
        let held = self.hold(text)?;
        let ino = self.at(text, path, &held)?;
        let entry = |name: Vec<u8>, ino: Ino| -> Result<ListEntry> {
            let attr = self.attr(held.root, ino)?;
            let is_link = attr.kind == Kind::Symlink;
            let target = is_link
                .then(|| self.target(held.root, ino, attr.size))
                .transpose()?;
            Ok(ListEntry {
                name,
                ino: ino.0,
                mode: attr.kind.mode() | u32::from(attr.mode),
                uid: attr.uid,
                gid: attr.gid,
                size: attr.size,
                mtime: attr.mtime,
                nlink: attr.nlink,
                target,
            })
        };
        if self.attr(held.root, ino)?.kind != Kind::Directory {
            let name = path.rsplit(|b| *b == b'/').next().unwrap_or_default();
            return Ok(vec![entry(name.to_vec(), ino)?]);
        }
        self.children(held.root, ino)?
            .into_iter()
            .map(|(name, (ino, _))| entry(name, ino))
            .collect()
    }

    /// Writes the content of a file of a version.
    pub fn cat(&self, text: &str, path: &[u8], out: &mut dyn Write) -> Result<()> {
        let held = self.hold(text)?;
        let ino = self.at(text, path, &held)?;
        let attr = self.attr(held.root, ino)?;
        if attr.kind != Kind::File {
            let path = String::from_utf8_lossy(path).into_owned();
            let path = path.trim_start_matches('/');
            return Err(EngineError::new(
                Code::Failed,
                format!("/{path} in {text} is no regular file"),
            ));
        }
        self.copy_out(held.root, ino, 0..attr.size, out)
    }

    pub(super) fn copy_out(
        &self,
        root: NodeId,
        ino: Ino,
        bytes: Range<u64>,
        out: &mut dyn Write,
    ) -> Result<()> {
        let mut buffer = vec![0; 1 << 20];
        let mut at = bytes.start;
        while at < bytes.end {
            let part = (bytes.end - at).min(buffer.len() as u64) as usize;
            view::read_base(&self.store, root, ino, at, &mut buffer[..part])?;
            out.write_all(&buffer[..part])
                .map_err(|e| EngineError::new(Code::Failed, format!("output: {e}")))?;
            at += part as u64;
        }
        Ok(())
    }

    /// Returns the paths that differ between two versions, or a version and a fork as it is now.
    pub fn diff(&self, a: &str, b: &str) -> Result<Vec<DiffEntry>> {
        let (old, new) = (self.hold_any(a)?, self.hold_any(b)?);
        let (old, new) = (old.root, new.root);
        let birth =
            |root| view::base_attr(&self.store, root, ROOT).map(|attr| attr.map(|attr| attr.btime));
        if let (Some(a), Some(b)) = (birth(old)?, birth(new)?)
            && a != b
        {
            // No common ancestor, so inode numbers say nothing: paths are compared.
            let mut out = Vec::new();
            self.diff_dirs((old, ROOT), (new, ROOT), &mut out)?;
            out.sort_by(|x, y| (&x.path, x.kind).cmp(&(&y.path, y.kind)));
            return Ok(out);
        }
        let mut inodes: BTreeSet<Ino> = BTreeSet::new();
        for difference in tree::diff(&*self.store, old, new) {
            let key = difference?.key;
            inodes.extend(match Key::parse(&key) {
                Some(
                    Key::Attr(ino)
                    | Key::Xattr { ino, .. }
                    | Key::Content { ino, .. }
                    | Key::Backref { ino, .. },
                ) => {
                    vec![ino]
                }
                _ => vec![],
            });
        }
        let mut out = Vec::new();
        let (mut old, mut new) = (Paths::new(&self.store, old), Paths::new(&self.store, new));
        for ino in inodes {
            self.diff_inode(&mut old, &mut new, ino, &mut out)?;
        }
        out.sort_by(|x, y| (&x.path, x.kind).cmp(&(&y.path, y.kind)));
        Ok(out)
    }

    /// Compares two directories by the paths below them. Folders may lie deeper than a stack goes, so those still to be
    /// compared are kept in a list.
    fn diff_dirs(
        &self,
        old: (NodeId, Ino),
        new: (NodeId, Ino),
        out: &mut Vec<DiffEntry>,
    ) -> Result<()> {
        let mut pairs = vec![(old, new, Vec::new())];
        while let Some((old, new, path)) = pairs.pop() {
            let (was, is) = (self.children(old.0, old.1)?, self.children(new.0, new.1)?);
            let names: BTreeSet<&Vec<u8>> = was.keys().chain(is.keys()).collect();
            for name in names {
                let path = [&path[..], b"/", name].concat();
                match (was.get(name), is.get(name)) {
                    (Some((a, x)), Some((b, y))) if x == y => {
                        let (old, new) = ((old.0, *a), (new.0, *b));
                        self.diff_one(old, new, &path, out)?;
                        if *x == Kind::Directory {
                            pairs.push((old, new, path));
                        }
                    }
                    (a, b) => {
                        if let Some(child) = a {
                            self.diff_whole(old.0, *child, DiffKind::Removed, &path, out)?;
                        }
                        if let Some(child) = b {
                            self.diff_whole(new.0, *child, DiffKind::Added, &path, out)?;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Names everything at and below a path that only one side has.
    fn diff_whole(
        &self,
        root: NodeId,
        child: (Ino, Kind),
        how: DiffKind,
        path: &[u8],
        out: &mut Vec<DiffEntry>,
    ) -> Result<()> {
        let mut below = vec![(child, path.to_vec())];
        while let Some(((ino, kind), path)) = below.pop() {
            let size = self.attr(root, ino)?.size;
            let (old_size, new_size) = if how == DiffKind::Removed {
                (size, 0)
            } else {
                (0, size)
            };
            if kind == Kind::Directory {
                for (name, child) in self.children(root, ino)? {
                    below.push((child, [&path[..], b"/", &name].concat()));
                }
            }
            out.push(DiffEntry {
                kind: how,
                path,
                from: None,
                old_size,
                new_size,
            });
        }
        Ok(())
    }

    /// Compares two inodes of the same kind and path: what a copy keeps of attributes, content, extended attributes.
    fn diff_one(
        &self,
        (old, a): (NodeId, Ino),
        (new, b): (NodeId, Ino),
        path: &[u8],
        out: &mut Vec<DiffEntry>,
    ) -> Result<()> {
        let (was, is) = (self.attr(old, a)?, self.attr(new, b)?);
        let kept = |attr: &Attr| {
            let mtime = if attr.kind == Kind::Directory {
                0
            } else {
                attr.mtime
            };
            (attr.mode, attr.uid, attr.gid, attr.rdev, attr.size, mtime)
        };
        let values = |root: NodeId, prefix: &[u8]| -> Result<Vec<tree::Pair>> {
            let mut out = Vec::new();
            for item in tree::prefix(&*self.store, root, prefix) {
                let (key, value) = item?;
                out.push((key[prefix.len()..].to_vec(), value));
            }
            Ok(out)
        };
        let content = record::content_prefix;
        let xattrs = record::xattrs_prefix;
        let same = kept(&was) == kept(&is)
            && values(old, &content(a))? == values(new, &content(b))?
            && values(old, &xattrs(a))? == values(new, &xattrs(b))?;
        if !same {
            let (old_size, new_size, path) = (was.size, is.size, path.to_vec());
            out.push(DiffEntry {
                kind: DiffKind::Changed,
                path,
                from: None,
                old_size,
                new_size,
            });
        }
        Ok(())
    }

    fn diff_inode(
        &self,
        old: &mut Paths<'_>,
        new: &mut Paths<'_>,
        ino: Ino,
        out: &mut Vec<DiffEntry>,
    ) -> Result<()> {
        let before = view::base_attr(&self.store, old.root, ino)?;
        let after = view::base_attr(&self.store, new.root, ino)?;
        // The same number and birth is the same file; a number that was used again is another one.
        let same = matches!((&before, &after), (Some(a), Some(b)) if a.btime == b.btime && a.kind == b.kind);
        let paths = |paths: &mut Paths<'_>, attr: &Option<Attr>| -> Result<BTreeSet<Vec<u8>>> {
            let Some(attr) = attr else {
                return Ok(BTreeSet::new());
            };
            if ino == ROOT {
                return Ok(BTreeSet::from([b"/".to_vec()]));
            }
            if attr.kind == Kind::Directory {
                let path = paths.of_folder(ino)?;
                return Ok(BTreeSet::from([path
                    .trim_end_matches('/')
                    .as_bytes()
                    .to_vec()]));
            }
            let names = paths.of(ino)?.into_iter();
            Ok(names.map(String::into_bytes).collect())
        };
        let (mut was, mut is) = (paths(old, &before)?, paths(new, &after)?);
        let (old_size, new_size) = (
            before.as_ref().map_or(0, |a| a.size),
            after.as_ref().map_or(0, |a| a.size),
        );
        let entry = |kind, path: Vec<u8>, from| DiffEntry {
            kind,
            path,
            from,
            old_size,
            new_size,
        };
        if same {
            let both: Vec<Vec<u8>> = was.intersection(&is).cloned().collect();
            let only_times = |a: &Attr, b: &Attr| {
                a.kind == Kind::Directory
                    && Attr {
                        atime: b.atime,
                        mtime: b.mtime,
                        ctime: b.ctime,
                        nlink: b.nlink,
                        ..a.clone()
                    } == *b
            };
            let quiet = matches!((&before, &after), (Some(a), Some(b)) if only_times(a, b));
            for path in both {
                was.remove(&path);
                is.remove(&path);
                if !quiet {
                    out.push(entry(DiffKind::Changed, path, None));
                }
            }
            while let (Some(from), Some(to)) = (was.pop_first(), is.pop_first()) {
                out.push(entry(DiffKind::Renamed, to, Some(from)));
            }
        }
        out.extend(
            was.into_iter()
                .map(|path| entry(DiffKind::Removed, path, None)),
        );
        out.extend(
            is.into_iter()
                .map(|path| entry(DiffKind::Added, path, None)),
        );
        Ok(())
    }

    /// Counts what the store holds.
    pub fn stats(&self) -> Result<Stats> {
        Ok(self.store.stats()?)
    }

    /// Checks every version.
    pub fn check(&self) -> Result<CheckReport> {
        Ok(self.store.check()?)
    }
}

//! A tar file on its way into a fork without a mount.

use std::io::{self, Read};

use tar::{Archive, EntryType};

use super::head::{self, Head, Input, Records};
use super::{EngineError, Result, XATTR, bad};
use crate::fork::error::FsError;
use crate::fork::extent::PAGE;
use crate::fs::{Caller, Entry, Fs, NewNode, SetAttr, XattrMode};
use crate::record::{Ino, Kind, ROOT};

/// The longest path: folders can be made deeper than a path of the kernel reaches, but not by way of a few bytes.
const PATH_MAX: usize = 64 << 10;
/// The holes of sparse files that are passed over in all: a few bytes say any number of them.
const HOLES_MAX: u64 = 1 << 40;

const ROOT_CALLER: Caller = Caller {
    uid: 0,
    gid: 0,
    request: crate::fork::log::Request {
        epoch: 0,
        unique: 0,
    },
};

/// The folders of a folder that are still to be removed.
type Folders = Vec<(Ino, Box<[u8]>)>;

pub struct Import {
    fs: Fs,
    warnings: Vec<String>,
    /// Folders, with the times they get when all is in them.
    times: Vec<(Ino, i64)>,
    holes: u64,
}

impl Import {
    pub fn new(fs: Fs) -> Import {
        Import {
            fs,
            warnings: Vec::new(),
            times: Vec::new(),
            holes: 0,
        }
    }

    /// The content of the tar file takes the place of what the volume had.
    pub fn run(mut self, input: &mut dyn Read) -> Result<Vec<String>> {
        self.clear()?;
        let input = Input::new(input);
        let mut archive = Archive::new(&input);
        let mut entries = archive.entries().map_err(bad)?;
        let mut is_first = true;
        loop {
            input.begin_head();
            let Some(entry) = entries.next() else { break };
            let mut entry = entry.map_err(|error| match (is_first, error.kind()) {
                // What the crate says of its blocks and fields helps nobody there.
                (true, io::ErrorKind::Other | io::ErrorKind::UnexpectedEof) => {
                    bad("it is no tar file, or compressed otherwise than with zstd")
                }
                (false, _) if input.is_cut_off() => bad("it is cut off"),
                _ => bad(error),
            })?;
            is_first = false;
            let head = Head::parse(&input.take_head()).map_err(bad)?;
            let path = head.path();
            self.entry(&head, &path, &mut entry)
                // What nobody wanted of the content is passed over, so that the next head begins behind it.
                .and_then(|()| io::copy(&mut entry, &mut io::sink()).map_err(bad))
                .map_err(|error| named(&path, error))?;
        }
        if input.is_cut_off() {
            return Err(bad("it has no end mark, so it may be cut off"));
        }
        for (ino, mtime) in self.times.into_iter().rev() {
            let set = SetAttr {
                mtime: Some(mtime),
                ..SetAttr::default()
            };
            self.fs.setattr(ROOT_CALLER, ino, set)?;
        }
        Ok(self.warnings)
    }

    /// Removes everything. Folders may lie deeper than a stack goes, so those on the way are kept in a list.
    fn clear(&self) -> Result<()> {
        let mut way = vec![(ROOT, self.unlink_all(ROOT)?)];
        while let Some((dir, folders)) = way.last_mut() {
            let dir = *dir;
            if let Some((ino, _)) = folders.last() {
                let ino = *ino;
                way.push((ino, self.unlink_all(ino)?));
                continue;
            }
            way.pop();
            if let Some((above, folders)) = way.last_mut()
                && let Some((ino, name)) = folders.pop()
            {
                debug_assert_eq!(ino, dir);
                self.fs.rmdir(ROOT_CALLER, *above, &name)?;
            }
        }
        Ok(())
    }

    /// Removes what a folder holds but folders, and returns those.
    fn unlink_all(&self, dir: Ino) -> Result<Folders> {
        let mut entries = Vec::new();
        self.fs.readdir(dir, 2, |entry| {
            entries.push(entry);
            true
        })?;
        let mut folders = Folders::new();
        for entry in entries {
            if entry.kind == Kind::Directory {
                folders.push((entry.ino, entry.name));
            } else {
                self.fs.unlink(ROOT_CALLER, dir, &entry.name)?;
            }
        }
        Ok(folders)
    }

    fn warn(&mut self, path: &[u8], what: impl std::fmt::Display) {
        let path = String::from_utf8_lossy(path);
        self.warnings.push(format!("{path}: {what}"));
    }

    fn entry<R: Read>(
        &mut self,
        head: &Head,
        path: &[u8],
        entry: &mut tar::Entry<'_, R>,
    ) -> Result<()> {
        let header = &head.header;
        let kind = match header.entry_type() {
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => Kind::File,
            EntryType::Directory => Kind::Directory,
            EntryType::Symlink => Kind::Symlink,
            EntryType::Fifo if head.records.get("FORKVOL.kind") == Some(b"socket") => Kind::Socket,
            EntryType::Fifo => Kind::Fifo,
            EntryType::Char => Kind::CharDevice,
            EntryType::Block => Kind::BlockDevice,
            EntryType::Link => {
                let target = head.target().ok_or_else(|| bad("a link names nothing"))?;
                return self.link(path, &target);
            }
            EntryType::XGlobalHeader => return self.global(entry),
            other => {
                let kind = other.as_byte().escape_ascii();
                self.warn(path, format!("entries of type '{kind}' cannot be kept"));
                return Ok(());
            }
        };
        let id = |key, plain| head.id(key, plain).map_err(bad);
        let (uid, gid) = (id("uid", header.uid())?, id("gid", header.gid())?);
        let mode = (header.mode().map_err(bad)? & 0o7777) as u16;
        let target = match kind {
            Kind::Symlink => head.target().ok_or_else(|| bad("a link names nothing"))?,
            _ => Vec::new(),
        };
        let rdev = match kind {
            Kind::CharDevice | Kind::BlockDevice => device(head)?,
            _ => 0,
        };
        let node = NewNode {
            kind,
            mode,
            umask: 0,
            rdev,
            target: &target,
        };
        let ino = self.place(path, node)?;
        if kind == Kind::File {
            self.content(head, ino, entry)?;
        }
        self.xattrs(head, path, ino)?;
        let owner = SetAttr {
            uid: Some(uid),
            gid: Some(gid),
            ..SetAttr::default()
        };
        self.fs.setattr(ROOT_CALLER, ino, owner)?;
        let mtime = head.mtime().map_err(bad)?;
        if mtime.is_none() {
            self.warn(path, "its time cannot be kept");
        }
        let mode = SetAttr {
            mode: (kind != Kind::Symlink).then_some(mode),
            mtime,
            ..SetAttr::default()
        };
        self.fs.setattr(ROOT_CALLER, ino, mode)?;
        if let (Kind::Directory, Some(mtime)) = (kind, mtime) {
            // Last, for what is put into a folder changes its time.
            self.times.push((ino, mtime));
        }
        Ok(())
    }

    /// Records for all entries behind them: a comment is none that matters.
    fn global<R: Read>(&mut self, entry: &mut tar::Entry<'_, R>) -> Result<()> {
        let mut content = Vec::new();
        let limit = PATH_MAX as u64;
        entry.take(limit).read_to_end(&mut content).map_err(bad)?;
        let records = Records::parse(&content).map_err(bad)?;
        let keys = records.below("").map(|(key, _)| key);
        let lost: Vec<String> = keys
            .filter(|key| *key != b"comment")
            .map(|key| String::from_utf8_lossy(key).into_owned())
            .collect();
        if !lost.is_empty() {
            let lost = lost.join(", ");
            self.warnings
                .push(format!("records for all entries cannot be kept: {lost}"));
        }
        Ok(())
    }

    fn content<R: Read>(
        &mut self,
        head: &Head,
        ino: Ino,
        entry: &mut tar::Entry<'_, R>,
    ) -> Result<()> {
        let (size, stored) = (entry.size(), head.size().map_err(bad)?);
        let sparse = head.header.entry_type() == EntryType::GNUSparse;
        let older = "make the tar file without --sparse, or with --format=gnu";
        let real = head.sparse_size().map_err(|error| bad(error).hint(older))?;
        if let (Some(real), false) = (real, sparse) {
            return self.parts(ino, real, stored, entry);
        }
        if sparse {
            self.holes = self.holes.saturating_add(size.saturating_sub(stored));
            if self.holes > HOLES_MAX {
                return Err(bad("its sparse files have holes of more than 1 TiB"));
            }
        } else if size != stored {
            return Err(bad("its size is said in two ways"));
        }
        self.copy(ino, (0, size), entry, sparse)?;
        if sparse {
            self.resize(ino, size)?;
        }
        Ok(())
    }

    /// A file of `size` bytes of which the parts that hold data are stored, behind where they lie.
    fn parts(&self, ino: Ino, size: u64, stored: u64, entry: &mut impl Read) -> Result<()> {
        let (parts, map) = head::read_map(entry, size).map_err(cut_off)?;
        let data: u64 = parts.iter().map(|(_, len)| len).sum();
        if map.checked_add(data) != Some(stored) {
            return Err(bad("its size is said in two ways"));
        }
        for part in parts {
            self.copy(ino, part, entry, false)?;
        }
        self.resize(ino, size)
    }

    fn resize(&self, ino: Ino, size: u64) -> Result<()> {
        let size = SetAttr {
            size: Some(size),
            ..SetAttr::default()
        };
        self.fs.setattr(ROOT_CALLER, ino, size)?;
        Ok(())
    }

    /// Writes what comes to a part of a file, `sparse` without its pages of zeros.
    fn copy(
        &self,
        ino: Ino,
        (from, len): (u64, u64),
        entry: &mut impl Read,
        sparse: bool,
    ) -> Result<()> {
        let mut buffer = vec![0; len.min(1 << 20) as usize];
        let (mut at, end) = (from, from + len);
        while at < end {
            let part = (end - at).min(buffer.len() as u64) as usize;
            let part = &mut buffer[..part];
            entry.read_exact(part).map_err(cut_off)?;
            if sparse {
                self.write_data(ino, at, part)?;
            } else {
                self.write(ino, at, part)?;
            }
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Writes the pages that are not zero: the others stay holes.
    fn write_data(&self, ino: Ino, at: u64, bytes: &[u8]) -> Result<()> {
        let mut at = at;
        let is_data = |page: &&[u8]| page.iter().any(|byte| *byte != 0);
        let page = PAGE as usize;
        for run in bytes
            .chunks(page)
            .collect::<Vec<_>>()
            .chunk_by(|a, b| is_data(a) == is_data(b))
        {
            let length: usize = run.iter().map(|page| page.len()).sum();
            if run.first().is_some_and(is_data) {
                self.write(ino, at, &run.concat())?;
            }
            at += length as u64;
        }
        Ok(())
    }

    /// Writes all of it.
    fn write(&self, ino: Ino, at: u64, bytes: &[u8]) -> Result<()> {
        match self.fs.write(ROOT_CALLER, ino, at, bytes, false)? {
            written if written < bytes.len() => Err(FsError::NoSpace.into()),
            _ => Ok(()),
        }
    }

    fn xattrs(&mut self, head: &Head, path: &[u8], ino: Ino) -> Result<()> {
        for (key, value) in head.records.below(XATTR) {
            let name = head::unescape(key);
            let mode = XattrMode::Any;
            match self.fs.setxattr(ROOT_CALLER, ino, &name, value, mode) {
                Err(FsError::NotSupported) => {
                    let name = String::from_utf8_lossy(&name);
                    self.warn(path, format!("the attribute {name} cannot be kept"));
                }
                other => other?,
            }
        }
        Ok(())
    }

    /// The directory that a path lies in, made where it is missing, and its last name; no name for the root.
    fn parent<'p>(&self, path: &'p [u8]) -> Result<(Ino, Option<&'p [u8]>)> {
        if path.len() > PATH_MAX {
            return Err(bad("the path is longer than 64 KiB"));
        }
        let mut parts: Vec<&[u8]> = path
            .split(|b| *b == b'/')
            .filter(|p| !p.is_empty() && *p != b".")
            .collect();
        if parts.contains(&&b".."[..]) {
            return Err(bad("the path leads out of it"));
        }
        let last = parts.pop();
        let mut dir = ROOT;
        for part in parts {
            dir = match self.fs.lookup(dir, part)? {
                Some(Entry { ino, attr }) if attr.kind == Kind::Directory => ino,
                Some(_) => return Err(bad("the path goes through what is no folder")),
                None => {
                    let node = NewNode::new(Kind::Directory, 0o755);
                    self.fs.make(ROOT_CALLER, dir, part, node)?.ino
                }
            };
        }
        Ok((dir, last))
    }

    /// Makes an inode at a path; what stands there gives way, save that a directory stays.
    fn place(&self, path: &[u8], node: NewNode<'_>) -> Result<Ino> {
        let (dir, Some(name)) = self.parent(path)? else {
            return match node.kind {
                Kind::Directory => Ok(ROOT),
                _ => Err(bad("the root is a folder and nothing else")),
            };
        };
        if let Some(there) = self.fs.lookup(dir, name)? {
            match (there.attr.kind, node.kind) {
                (Kind::Directory, Kind::Directory) => return Ok(there.ino),
                (Kind::Directory, _) => self.fs.rmdir(ROOT_CALLER, dir, name)?,
                _ => self.fs.unlink(ROOT_CALLER, dir, name)?,
            }
        }
        Ok(self.fs.make(ROOT_CALLER, dir, name, node)?.ino)
    }

    fn link(&self, path: &[u8], target: &[u8]) -> Result<()> {
        let missing = || bad("it is a link to nothing");
        let (target_dir, Some(target_name)) = self.parent(target)? else {
            return Err(missing());
        };
        let there = self.fs.lookup(target_dir, target_name)?;
        let there = there.ok_or_else(missing)?;
        if there.attr.kind == Kind::Directory {
            return Err(bad("it is a link to a folder"));
        }
        let (dir, Some(name)) = self.parent(path)? else {
            return Err(bad("the root is a folder and nothing else"));
        };
        match self.fs.lookup(dir, name)? {
            // It is what it is to become.
            Some(old) if old.ino == there.ino => return Ok(()),
            Some(_) => self.fs.unlink(ROOT_CALLER, dir, name)?,
            None => {}
        }
        self.fs.link(ROOT_CALLER, there.ino, dir, name)?;
        Ok(())
    }
}

fn cut_off(error: io::Error) -> EngineError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => bad("the content is cut off"),
        _ => bad(error),
    }
}

/// The device that an entry stands for.
fn device(head: &Head) -> Result<u32> {
    let numbers = head.device().map_err(bad)?;
    let device = crate::sys::mount::device_number(numbers);
    u32::try_from(device).map_err(|_| bad("its device numbers are out of range"))
}

/// An error with the path of its entry.
fn named(path: &[u8], error: EngineError) -> EngineError {
    let path = String::from_utf8_lossy(path);
    let what = error.message.strip_prefix(super::PREFIX);
    let message = match what {
        Some(what) => format!("{}{path}: {what}", super::PREFIX),
        None => format!("{}{path}: {}", super::PREFIX, error.message),
    };
    EngineError { message, ..error }
}

//! Versions as tar files, both ways: PAX records carry what plain tar cannot (nanoseconds, extended attributes, long names).

use std::collections::HashMap;
use std::io::{Read, Write};
use std::sync::Arc;

use tar::{Archive, Builder, EntryType, Header};

use super::{
    Code, CommitRequest, Engine, EngineError, ForkRequest, Owner, Result, VersionInfo, When,
};
use crate::fork::error::FsError;
use crate::fork::view;
use crate::fs::{Caller, Entry, Fs, NewNode, Options, Ownership, SetAttr, XattrMode};
use crate::record::{self, Attr, Ino, Key, Kind, ROOT, Value};
use crate::store::{Step, Verdict};
use crate::tree;

/// What an export has written so far.
#[derive(Default)]
struct Exported {
    /// The first path of each file with several.
    links: HashMap<Ino, Vec<u8>>,
    warnings: Vec<String>,
}

/// What came of an import.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Imported {
    pub version: Option<VersionInfo>,
    /// What the tar file held and a volume cannot.
    pub warnings: Vec<String>,
}

const XATTR: &str = "SCHILY.xattr.";

fn output(error: std::io::Error) -> EngineError {
    EngineError::new(Code::Failed, format!("the tar file: {error}"))
}

fn bad(what: impl std::fmt::Display) -> EngineError {
    EngineError::new(Code::Usage, format!("the tar file: {what}"))
}

/// A time as PAX writes it: seconds and a fraction.
fn pax_time(time: i64) -> String {
    let (seconds, nanos) = (
        time.div_euclid(1_000_000_000),
        time.rem_euclid(1_000_000_000),
    );
    if seconds < 0 && nanos > 0 {
        // PAX counts the fraction away from zero.
        format!("-{}.{:09}", -(seconds + 1), 1_000_000_000 - nanos)
    } else {
        format!("{seconds}.{nanos:09}")
    }
}

fn parse_pax_time(text: &str) -> Option<i64> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text),
    };
    let (seconds, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let nanos: String = fraction
        .chars()
        .chain(std::iter::repeat('0'))
        .take(9)
        .collect();
    let time = seconds
        .parse::<i64>()
        .ok()?
        .checked_mul(1_000_000_000)?
        .checked_add(nanos.parse().ok()?)?;
    Some(if negative { -time } else { time })
}

impl Engine {
    /// Writes a version as a tar file; returns what only forkvol will read back as it was.
    ///
    /// # Errors
    /// `NotFound`; what the store or the output answered.
    pub fn export(&self, text: &str, out: &mut dyn Write) -> Result<Vec<String>> {
        let held = self.hold(text)?;
        let mut builder = Builder::new(out);
        let mut done = Exported::default();
        if held.root != tree::empty().0 {
            self.export_dir(&mut builder, held.root, ROOT, b".", &mut done)?;
        }
        builder
            .into_inner()
            .and_then(|out| out.flush())
            .map_err(output)?;
        Ok(done.warnings)
    }

    fn export_dir(
        &self,
        builder: &mut Builder<&mut dyn Write>,
        root: tree::NodeId,
        dir: Ino,
        path: &[u8],
        done: &mut Exported,
    ) -> Result<()> {
        self.export_one(builder, root, dir, path, done)?;
        for (name, (ino, kind)) in self.children(root, dir)? {
            let path = [path, b"/", &name].concat();
            if kind == Kind::Directory {
                self.export_dir(builder, root, ino, &path, done)?;
            } else {
                self.export_one(builder, root, ino, &path, done)?;
            }
        }
        Ok(())
    }

    fn export_one(
        &self,
        builder: &mut Builder<&mut dyn Write>,
        root: tree::NodeId,
        ino: Ino,
        path: &[u8],
        done: &mut Exported,
    ) -> Result<()> {
        let attr = view::base_attr(&self.store, root, ino)?;
        let attr = attr.ok_or_else(|| {
            EngineError::new(Code::Damaged, format!("inode {ino} has no attributes"))
        })?;
        let mut pax: Vec<(String, Vec<u8>)> = vec![
            ("path".into(), path.to_vec()),
            ("mtime".into(), pax_time(attr.mtime).into_bytes()),
            ("atime".into(), pax_time(attr.atime).into_bytes()),
        ];
        let mut header = Header::new_ustar();
        header.set_mode(u32::from(attr.mode));
        header.set_mtime(attr.mtime.div_euclid(1_000_000_000).max(0) as u64);
        for (name, id) in [("uid", attr.uid), ("gid", attr.gid)] {
            pax.push((name.into(), id.to_string().into_bytes()));
        }
        // What does not fit into the header is in the records before it.
        header.set_uid(u64::from(attr.uid) & 0o777_7777);
        header.set_gid(u64::from(attr.gid) & 0o777_7777);
        header.set_size(0);
        header.set_path(format!("{ino}")).map_err(output)?;
        let first = if attr.nlink > 1 && attr.kind != Kind::Directory {
            done.links.get(&ino)
        } else {
            None
        };
        if let Some(first) = first {
            header.set_entry_type(EntryType::Link);
            pax.push(("linkpath".into(), first.clone()));
        } else {
            done.links.insert(ino, path.to_vec());
            if attr.kind == Kind::Socket {
                let path = String::from_utf8_lossy(path);
                done.warnings
                    .push(format!("{path}: a socket, which tar shows as a pipe"));
            }
            self.export_kind(root, ino, &attr, &mut header, &mut pax)?;
            for item in tree::prefix(&*self.store, root, &record::xattrs_prefix(ino)) {
                let (key, value) = item?;
                if let (Some(Key::Xattr { name, .. }), Some(value)) =
                    (Key::parse(&key), Value::decode(&value))
                {
                    let name = format!("{XATTR}{}", String::from_utf8_lossy(name));
                    pax.push((name, view::load(&self.store, &value)?));
                }
            }
        }
        let records = pax
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_slice()));
        builder.append_pax_extensions(records).map_err(output)?;
        if header.entry_type() == EntryType::Regular && attr.size > 0 {
            header.set_size(attr.size);
            header.set_cksum();
            let out = builder.get_mut();
            out.write_all(header.as_bytes()).map_err(output)?;
            self.copy_out(root, ino, attr.size, *out)?;
            let padding = attr.size.next_multiple_of(512) - attr.size;
            builder
                .get_mut()
                .write_all(&vec![0; padding as usize])
                .map_err(output)
        } else {
            header.set_cksum();
            builder.append(&header, std::io::empty()).map_err(output)
        }
    }

    fn export_kind(
        &self,
        root: tree::NodeId,
        ino: Ino,
        attr: &Attr,
        header: &mut Header,
        pax: &mut Vec<(String, Vec<u8>)>,
    ) -> Result<()> {
        let kind = match attr.kind {
            Kind::File => EntryType::Regular,
            Kind::Directory => EntryType::Directory,
            Kind::Symlink => {
                pax.push(("linkpath".into(), self.bytes(root, ino, attr.size)?));
                EntryType::Symlink
            }
            Kind::Fifo => EntryType::Fifo,
            Kind::CharDevice => EntryType::Char,
            Kind::BlockDevice => EntryType::Block,
            Kind::Socket => {
                // Tar has no sockets; this record is read back by import alone.
                pax.push(("FORKVOL.kind".into(), b"socket".to_vec()));
                EntryType::Fifo
            }
        };
        header.set_entry_type(kind);
        if matches!(attr.kind, Kind::CharDevice | Kind::BlockDevice) {
            let (major, minor) = crate::sys::device_numbers(u64::from(attr.rdev));
            header.set_device_major(major).map_err(output)?;
            header.set_device_minor(minor).map_err(output)?;
        }
        Ok(())
    }

    /// Makes the next version of a volume of a tar file.
    ///
    /// # Errors
    /// `Usage` for what is no tar file; the volume is then as it was.
    pub fn import(
        &self,
        volume: &str,
        input: &mut dyn Read,
        (uid, gid): (u32, u32),
    ) -> Result<Imported> {
        let request = ForkRequest {
            volume: volume.into(),
            from: None,
            parents: Vec::new(),
            read_only: false,
            ephemeral: false,
            size: u64::MAX >> 1,
            labels: Default::default(),
            excludes: Vec::new(),
            default_excludes: false,
            owner: Owner::Keep,
            acl: true,
            suid: false,
            dev: false,
            strict: false,
            job: None,
            uid_map: None,
            verdict: Verdict::Off,
            scope: String::new(),
            uid,
            gid,
        };
        let info = self.fork(request)?;
        let id = info.id.parse().map_err(|()| super::no_fork(&info.id))?;
        let fork = self.live(id)?.fork()?.clone();
        let options = Options {
            read_only: false,
            ownership: Ownership::Keep,
            acl: true,
        };
        let imported = Import {
            fs: Fs::new(Arc::clone(&fork), options),
            warnings: Vec::new(),
        }
        .run(input)
        .and_then(|warnings| {
            self.store.reach(Step::Unpacked)?;
            Ok(warnings)
        });
        fork.end_session(0);
        let commit = CommitRequest {
            keep: false,
            labels: Default::default(),
            message: Some("import".into()),
            if_head: None,
            if_base: false,
            force: false,
            when: When::Always,
        };
        let warnings = match imported {
            Ok(warnings) => warnings,
            Err(error) => {
                self.abandon(id)?;
                return Err(error);
            }
        };
        let version = self.commit(vec![id], commit).inspect_err(|_| {
            if let Err(error) = self.abandon(id) {
                log::warn!("fork {id} of an import stays: {error}");
            }
        })?;
        let version = version.into_iter().next().and_then(|done| done.version);
        Ok(Imported { version, warnings })
    }
}

/// A tar file on its way into a fork without a mount.
struct Import {
    fs: Fs,
    warnings: Vec<String>,
}

const ROOT_CALLER: Caller = Caller {
    uid: 0,
    gid: 0,
    request: crate::fork::log::Request {
        epoch: 0,
        unique: 0,
    },
};

impl Import {
    /// The content of the tar file takes the place of what the volume had.
    fn run(mut self, input: &mut dyn Read) -> Result<Vec<String>> {
        self.clear(ROOT)?;
        let mut archive = Archive::new(input);
        let mut times: Vec<(Ino, i64)> = Vec::new();
        for entry in archive.entries().map_err(bad)? {
            let mut entry = entry.map_err(bad)?;
            self.entry(&mut entry, &mut times)?;
        }
        // Last, for what was put into a directory has changed its time.
        for (ino, mtime) in times.into_iter().rev() {
            self.fs.setattr(
                ROOT_CALLER,
                ino,
                SetAttr {
                    mtime: Some(mtime),
                    ..SetAttr::default()
                },
            )?;
        }
        Ok(self.warnings)
    }

    fn clear(&self, dir: Ino) -> Result<()> {
        let mut entries = Vec::new();
        self.fs.readdir(dir, 2, |entry| {
            entries.push(entry);
            true
        })?;
        for entry in entries {
            if entry.kind == Kind::Directory {
                self.clear(entry.ino)?;
                self.fs.rmdir(ROOT_CALLER, dir, &entry.name)?;
            } else {
                self.fs.unlink(ROOT_CALLER, dir, &entry.name)?;
            }
        }
        Ok(())
    }

    fn entry<R: Read>(
        &mut self,
        entry: &mut tar::Entry<'_, R>,
        times: &mut Vec<(Ino, i64)>,
    ) -> Result<()> {
        let mut pax: HashMap<String, Vec<u8>> = HashMap::new();
        if let Some(records) = entry.pax_extensions().map_err(bad)? {
            for record in records {
                let record = record.map_err(bad)?;
                let key = record.key().map_err(bad)?.to_owned();
                pax.insert(key, record.value_bytes().to_vec());
            }
        }
        let text = |key: &str| {
            pax.get(key)
                .map(|value| String::from_utf8_lossy(value).into_owned())
        };
        let path = entry.path_bytes().into_owned();
        let header = entry.header().clone();
        let number = |key: &str, plain: std::io::Result<u64>| -> Result<u32> {
            let value = match text(key) {
                Some(text) => text.parse().map_err(bad)?,
                None => plain.map_err(bad)?,
            };
            u32::try_from(value).map_err(bad)
        };
        let (uid, gid) = (number("uid", header.uid())?, number("gid", header.gid())?);
        let mtime = match text("mtime").and_then(|text| parse_pax_time(&text)) {
            Some(time) => time,
            None => i64::try_from(header.mtime().map_err(bad)?)
                .unwrap_or(0)
                .saturating_mul(1_000_000_000),
        };
        let mode = (header.mode().map_err(bad)? & 0o7777) as u16;
        let kind = match header.entry_type() {
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => Kind::File,
            EntryType::Directory => Kind::Directory,
            EntryType::Symlink => Kind::Symlink,
            EntryType::Fifo if text("FORKVOL.kind").as_deref() == Some("socket") => Kind::Socket,
            EntryType::Fifo => Kind::Fifo,
            EntryType::Char => Kind::CharDevice,
            EntryType::Block => Kind::BlockDevice,
            EntryType::Link => {
                let target = entry
                    .link_name_bytes()
                    .ok_or_else(|| bad("a link names nothing"))?
                    .into_owned();
                return self.link(&path, &target);
            }
            EntryType::XGlobalHeader => return Ok(()),
            other => {
                let path = String::from_utf8_lossy(&path);
                self.warnings
                    .push(format!("{path}: entries of type {other:?} cannot be kept"));
                return Ok(());
            }
        };
        let target = entry
            .link_name_bytes()
            .map(|target| target.into_owned())
            .unwrap_or_default();
        let rdev = match (
            header.device_major().ok().flatten(),
            header.device_minor().ok().flatten(),
        ) {
            (Some(major), Some(minor)) => crate::sys::mount::device_number((major, minor)) as u32,
            _ => 0,
        };
        let node = NewNode {
            kind,
            mode,
            umask: 0,
            rdev,
            target: if kind == Kind::Symlink { &target } else { b"" },
        };
        let ino = self.place(&path, node)?;
        if kind == Kind::File {
            let mut buffer = vec![0; 1 << 20];
            let mut at = 0;
            loop {
                let read = entry.read(&mut buffer).map_err(bad)?;
                if read == 0 {
                    break;
                }
                self.fs
                    .write(ROOT_CALLER, ino, at, &buffer[..read], false)?;
                at += read as u64;
            }
        }
        for (key, value) in &pax {
            let Some(name) = key.strip_prefix(XATTR) else {
                continue;
            };
            match self
                .fs
                .setxattr(ROOT_CALLER, ino, name.as_bytes(), value, XattrMode::Any)
            {
                Err(FsError::NotSupported) => {
                    let path = String::from_utf8_lossy(&path);
                    self.warnings
                        .push(format!("{path}: the attribute {name} cannot be kept"));
                }
                other => other?,
            }
        }
        let owner = SetAttr {
            uid: Some(uid),
            gid: Some(gid),
            ..SetAttr::default()
        };
        self.fs.setattr(ROOT_CALLER, ino, owner)?;
        let mode = SetAttr {
            mode: (kind != Kind::Symlink).then_some(mode),
            mtime: Some(mtime),
            ..SetAttr::default()
        };
        self.fs.setattr(ROOT_CALLER, ino, mode)?;
        if kind == Kind::Directory {
            times.push((ino, mtime));
        }
        Ok(())
    }

    /// The directory that a path lies in, made where it is missing, and its last name; no name for the root.
    fn parent<'p>(&self, path: &'p [u8]) -> Result<(Ino, Option<&'p [u8]>)> {
        let mut parts: Vec<&[u8]> = path
            .split(|b| *b == b'/')
            .filter(|p| !p.is_empty() && *p != b".")
            .collect();
        if parts.contains(&&b".."[..]) {
            return Err(bad(format!(
                "{} leads out of it",
                String::from_utf8_lossy(path)
            )));
        }
        let last = parts.pop();
        let mut dir = ROOT;
        for part in parts {
            dir = match self.fs.lookup(dir, part)? {
                Some(Entry { ino, attr }) if attr.kind == Kind::Directory => ino,
                Some(_) => {
                    return Err(bad(format!(
                        "{} lies in a file",
                        String::from_utf8_lossy(path)
                    )));
                }
                None => {
                    self.fs
                        .make(ROOT_CALLER, dir, part, NewNode::new(Kind::Directory, 0o755))?
                        .ino
                }
            };
        }
        Ok((dir, last))
    }

    /// Makes an inode at a path; what stands there gives way, save that a directory stays.
    fn place(&self, path: &[u8], node: NewNode<'_>) -> Result<Ino> {
        let (dir, Some(name)) = self.parent(path)? else {
            return Ok(ROOT);
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
        let missing = || {
            bad(format!(
                "{} is a link to nothing",
                String::from_utf8_lossy(path)
            ))
        };
        let (target_dir, Some(target_name)) = self.parent(target)? else {
            return Err(missing());
        };
        let there = self
            .fs
            .lookup(target_dir, target_name)?
            .ok_or_else(missing)?;
        let (dir, Some(name)) = self.parent(path)? else {
            return Err(missing());
        };
        if self.fs.lookup(dir, name)?.is_some() {
            self.fs.unlink(ROOT_CALLER, dir, name)?;
        }
        self.fs.link(ROOT_CALLER, there.ino, dir, name)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_survive_pax() {
        for time in [
            0,
            1,
            -1,
            1_700_000_000_123_456_789,
            -1_500_000_001,
            -2_000_000_000,
        ] {
            assert_eq!(parse_pax_time(&pax_time(time)), Some(time), "{time}");
        }
    }
}

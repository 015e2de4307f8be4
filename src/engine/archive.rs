//! Versions as tar files, both ways: PAX records carry what plain tar cannot (nanoseconds, extended attributes, long names), and
//! files with large holes are written without them, in the PAX form of GNU tar, version 1.0.

mod head;
mod import;

use std::collections::HashMap;
use std::io::{Read, Write};
use std::sync::{Arc, Weak};

use tar::{Builder, EntryType, Header};

use super::{Code, CommitRequest, Engine, EngineError, ForkRequest, Owner, Result, VersionInfo};
use crate::fork::extent::{PAGE, pages};
use crate::fork::view;
use crate::fs::{Fs, Options, Ownership};
use crate::record::{self, Attr, Ino, Key, Kind, ROOT, Value};
use crate::store::{Step, Verdict};
use crate::tree;

use head::time_text;
use import::Import;

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

/// A file is written without its holes if they have at least so many blocks of 512 bytes.
const HOLES_MIN: u64 = 128;

const XATTR: &str = "SCHILY.xattr.";

/// What an error of a tar file begins with.
const PREFIX: &str = "the tar file: ";

fn output(error: std::io::Error) -> EngineError {
    EngineError::new(Code::Failed, format!("{PREFIX}{error}"))
}

fn bad(what: impl std::fmt::Display) -> EngineError {
    EngineError::new(Code::Failed, format!("{PREFIX}{what}"))
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
            self.export_all(&mut builder, held.root, &mut done)?;
        }
        builder
            .into_inner()
            .and_then(|out| out.flush())
            .map_err(output)?;
        Ok(done.warnings)
    }

    /// Folders may lie deeper than a stack goes, so those on the way are kept in a list.
    fn export_all(
        &self,
        builder: &mut Builder<&mut dyn Write>,
        root: tree::NodeId,
        done: &mut Exported,
    ) -> Result<()> {
        let mut path = b".".to_vec();
        self.export_one(builder, root, (ROOT, ROOT), &path, done)?;
        let mut folders = vec![(ROOT, path.len(), self.children(root, ROOT)?.into_iter())];
        while let Some((dir, length, children)) = folders.last_mut() {
            path.truncate(*length);
            let Some((name, (ino, kind))) = children.next() else {
                folders.pop();
                continue;
            };
            path.push(b'/');
            path.extend_from_slice(&name);
            self.export_one(builder, root, (*dir, ino), &path, done)?;
            if kind == Kind::Directory {
                let children = self.children(root, ino)?.into_iter();
                folders.push((ino, path.len(), children));
            }
        }
        Ok(())
    }

    fn export_one(
        &self,
        builder: &mut Builder<&mut dyn Write>,
        root: tree::NodeId,
        (dir, ino): (Ino, Ino),
        path: &[u8],
        done: &mut Exported,
    ) -> Result<()> {
        let damaged = |what: &str| {
            let path = String::from_utf8_lossy(path);
            EngineError::new(Code::Damaged, format!("{path}: {what}"))
        };
        let attr = view::base_attr(&self.store, root, ino)?;
        let attr = attr.ok_or_else(|| damaged("it has no attributes"))?;
        // A folder has one place, so no way down runs in a circle.
        if attr.kind == Kind::Directory && attr.parent != dir {
            return Err(damaged("the folder belongs elsewhere"));
        }
        let mut pax: Vec<(String, Vec<u8>)> = vec![
            ("path".into(), path.to_vec()),
            ("mtime".into(), time_text(attr.mtime).into_bytes()),
            ("atime".into(), time_text(attr.atime).into_bytes()),
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
                let (Some(Key::Xattr { name, .. }), Some(value)) =
                    (Key::parse(&key), Value::decode(&value))
                else {
                    return Err(damaged("an extended attribute cannot be read"));
                };
                let Ok(name) = str::from_utf8(name) else {
                    let path = String::from_utf8_lossy(path);
                    let name = name.escape_ascii();
                    done.warnings
                        .push(format!("{path}: the attribute {name} cannot be kept"));
                    continue;
                };
                let name = format!("{XATTR}{}", head::escape(name));
                pax.push((name, view::load(&self.store, &value)?));
            }
        }
        let mut parts = vec![(0, attr.size)];
        let mut map = Vec::new();
        if header.entry_type() == EntryType::Regular
            && (pages(attr.size) * 8).saturating_sub(attr.blocks) >= HOLES_MIN
        {
            parts = self.data(root, ino, attr.size)?;
            map = head::map(&parts);
            pax.extend(head::sparse(path, attr.size));
        }
        let records = pax
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_slice()));
        builder.append_pax_extensions(records).map_err(output)?;
        if header.entry_type() == EntryType::Regular && attr.size > 0 {
            let stored = parts.iter().map(|(_, len)| len).sum::<u64>() + map.len() as u64;
            header.set_size(stored);
            header.set_cksum();
            let out = builder.get_mut();
            out.write_all(header.as_bytes()).map_err(output)?;
            out.write_all(&map).map_err(output)?;
            for (at, len) in parts {
                self.copy_out(root, ino, at..at + len, *out)?;
            }
            let padding = stored.next_multiple_of(512) - stored;
            out.write_all(&vec![0; padding as usize]).map_err(output)
        } else {
            header.set_cksum();
            builder.append(&header, std::io::empty()).map_err(output)
        }
    }

    /// The parts of a file that hold data, as (offset, length), and an empty one at the end of a file that ends in a hole.
    fn data(&self, root: tree::NodeId, ino: Ino, size: u64) -> Result<Vec<(u64, u64)>> {
        let runs = view::base_runs(&self.store, root, ino, 0, pages(size))?;
        let part = |(page, pages): (u64, u64)| {
            let at = page * PAGE;
            (at, (pages * PAGE).min(size - at))
        };
        let mut parts: Vec<(u64, u64)> = runs.into_iter().map(part).collect();
        if parts.last().is_none_or(|(at, len)| at + len < size) {
            parts.push((size, 0));
        }
        Ok(parts)
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
                pax.push(("linkpath".into(), self.target(root, ino, attr.size)?));
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
    /// `Failed` for what is no tar file; the volume is then as it was.
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
            import: true,
            owner: Owner::Keep,
            acl: true,
            suid: false,
            dev: false,
            job: None,
            uid_map: None,
            verdict: Verdict::Off,
            scope: String::new(),
            uid,
            gid,
            asker: Weak::new(),
        };
        let info = self.make_fork(request)?;
        let id = info.id.parse().map_err(|()| super::no_fork(&info.id))?;
        let fork = self.live(id)?.fork()?.clone();
        let options = Options {
            read_only: false,
            ownership: Ownership::Keep,
            acl: true,
        };
        let imported = Import::new(Fs::new(Arc::clone(&fork), options))
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
            when: Default::default(),
        };
        let warnings = match imported {
            Ok(warnings) => warnings,
            Err(error) => {
                self.drop_fork(id)?;
                return Err(error);
            }
        };
        let version = self.commit(vec![id], commit).inspect_err(|_| {
            if let Err(error) = self.drop_fork(id) {
                log::warn!("fork {id} of an import stays: {error}");
            }
        })?;
        let version = version.into_iter().next().and_then(|done| done.version);
        Ok(Imported { version, warnings })
    }
}

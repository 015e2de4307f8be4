//! rename, with its flags.

use super::name::lose_name;
use super::node::touch_parent;
use super::{Caller, Fs, LINK_MAX, NewNode, check_name, now};
use crate::fork::error::FsError;
use crate::fork::{Layers, Tx};
use crate::record::{Attr, Ino, Kind, Nanos, ROOT, hash56};

/// What a rename does with the name it takes and the one it leaves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RenameMode {
    Replace,
    /// RENAME_NOREPLACE
    NoReplace,
    /// RENAME_EXCHANGE
    Exchange,
    /// RENAME_WHITEOUT: a character device 0:0 stays under the old name.
    Whiteout,
    /// RENAME_WHITEOUT | RENAME_NOREPLACE
    WhiteoutNoReplace,
}

/// A name in a directory.
#[derive(Clone, Copy)]
struct Place<'a> {
    dir: Ino,
    hash: u64,
    name: &'a [u8],
}

impl Fs {
    /// Moves what is at (`from`, `name`) to (`to`, `new_name`).
    pub fn rename(
        &self,
        caller: Caller,
        (from, name): (Ino, &[u8]),
        (to, new_name): (Ino, &[u8]),
        mode: RenameMode,
    ) -> Result<(), FsError> {
        self.writable()?;
        check_name(name)?;
        check_name(new_name)?;
        let old = Place {
            dir: from,
            hash: hash56(name),
            name,
        };
        let new = Place {
            dir: to,
            hash: hash56(new_name),
            name: new_name,
        };
        let mut tx = self.begin()?;
        let store = &self.fork.store;
        let source = tx
            .layers
            .entry(store, from, old.hash, name)?
            .ok_or(FsError::NotFound)?;
        let target = tx.layers.entry(store, to, new.hash, new_name)?;
        let no_replace = matches!(mode, RenameMode::NoReplace | RenameMode::WhiteoutNoReplace);
        if target.is_some() && no_replace {
            return Err(FsError::Exists);
        }
        if target.is_none() && mode == RenameMode::Exchange {
            return Err(FsError::NotFound);
        }
        if target.is_some_and(|(ino, _)| ino == source.0) {
            // Two names of one inode: nothing happens.
            return Ok(());
        }
        if tx
            .layers
            .attr(store, to)?
            .is_none_or(|attr| attr.nlink == 0)
        {
            return Err(FsError::NotFound);
        }
        self.check_no_cycle(&tx.layers, source, to)?;
        match (mode, target) {
            (RenameMode::Exchange, Some(target)) => self.check_no_cycle(&tx.layers, target, from),
            _ => self.check_replace(&tx, source.1, target, old, new),
        }?;
        let whiteout = NewNode::new(Kind::CharDevice, 0);
        let inherited = match mode {
            RenameMode::Whiteout | RenameMode::WhiteoutNoReplace => {
                Some(self.inherit(&tx, from, &whiteout)?)
            }
            _ => None,
        };
        // Names stand still now; what follows needs the inodes themselves, and looks nothing up any more.
        let mut inos = vec![from, to, source.0];
        inos.extend(target.map(|(ino, _)| ino));
        tx.lock(&inos)?;
        let time = now();
        if let (RenameMode::Exchange, Some(target)) = (mode, target) {
            exchange(&mut tx, source, target, old, new, time);
        } else {
            replace(&mut tx, source, target, old, new, time);
            if let Some(inherited) = inherited {
                let (ino, _) = self.create(&mut tx, caller, from, &whiteout, inherited, time)?;
                tx.set_entry(old.dir, old.hash, old.name, Some((ino, Kind::CharDevice)));
            }
        }
        tx.finish(caller.request)
    }

    /// Fails if the new name may not be taken by an inode of this kind.
    fn check_replace(
        &self,
        tx: &Tx<'_>,
        kind: Kind,
        target: Option<(Ino, Kind)>,
        old: Place<'_>,
        new: Place<'_>,
    ) -> Result<(), FsError> {
        let store = &self.fork.store;
        let is_dir = kind == Kind::Directory;
        match target {
            None => self.check_free(tx, new.dir, new.hash, new.name)?,
            Some((_, Kind::Directory)) if !is_dir => return Err(FsError::IsDirectory),
            Some((victim, Kind::Directory)) => {
                if !tx.layers.is_empty_dir(store, victim)? {
                    return Err(FsError::NotEmpty);
                }
            }
            Some(_) if is_dir => return Err(FsError::NotDirectory),
            Some(_) => {}
        }
        let full = |attr: Attr| attr.nlink >= LINK_MAX;
        if is_dir && old.dir != new.dir && tx.layers.attr(store, new.dir)?.is_some_and(full) {
            return Err(FsError::TooManyLinks);
        }
        Ok(())
    }

    /// Fails if `source` is a directory at or above `dir`.
    fn check_no_cycle(
        &self,
        layers: &Layers,
        source: (Ino, Kind),
        dir: Ino,
    ) -> Result<(), FsError> {
        if source.1 != Kind::Directory {
            return Ok(());
        }
        let mut at = dir;
        loop {
            if at == source.0 {
                return Err(FsError::Invalid);
            }
            if at == ROOT {
                return Ok(());
            }
            match layers.attr(&self.fork.store, at)? {
                Some(attr) if attr.parent != at => at = attr.parent,
                _ => return Ok(()),
            }
        }
    }
}

fn replace(
    tx: &mut Tx<'_>,
    (ino, kind): (Ino, Kind),
    target: Option<(Ino, Kind)>,
    old: Place<'_>,
    new: Place<'_>,
    time: Nanos,
) {
    if let Some((victim, _)) = target {
        lose_name(tx, victim, new.dir, new.name, time);
    }
    tx.set_entry(old.dir, old.hash, old.name, None);
    tx.set_entry(new.dir, new.hash, new.name, Some((ino, kind)));
    moved(tx, ino, old, new, time);
    touch_parent(tx, old.dir, time);
    touch_parent(tx, new.dir, time);
}

/// Gives a directory its new parent, or a file its new name.
fn moved(tx: &mut Tx<'_>, ino: Ino, old: Place<'_>, new: Place<'_>, time: Nanos) {
    let attr = tx.attr_mut(ino);
    attr.ctime = time;
    if attr.kind == Kind::Directory {
        if old.dir != new.dir {
            attr.parent = new.dir;
            tx.attr_mut(old.dir).nlink -= 1;
            tx.attr_mut(new.dir).nlink += 1;
        }
    } else {
        tx.set_unlinked(ino, old.dir, old.name);
    }
}

fn exchange(
    tx: &mut Tx<'_>,
    a: (Ino, Kind),
    b: (Ino, Kind),
    old: Place<'_>,
    new: Place<'_>,
    time: Nanos,
) {
    tx.set_entry(old.dir, old.hash, old.name, Some(b));
    tx.set_entry(new.dir, new.hash, new.name, Some(a));
    moved(tx, a.0, old, new, time);
    moved(tx, b.0, new, old, time);
    touch_parent(tx, old.dir, time);
    touch_parent(tx, new.dir, time);
}

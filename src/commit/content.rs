//! The content of one file as the tree holds it: by its bytes and holes alone, however it came to have them.

use std::sync::atomic::AtomicUsize;

use super::cut::Old;
use crate::chunk::{self, ChunkId, INLINE_MAX, Place, SINGLE_MAX};
use crate::fork::Fork;
use crate::fork::error::FsError;
use crate::fork::extent::{PAGE, pages};
use crate::fork::table::{Ingested, Inode};
use crate::fork::view;
use crate::record::{Ino, Value};
use crate::store::Ingest;
use crate::tree::NodeId;

/// Where the bytes of a file come from, and where its chunks go.
pub struct Source<'a> {
    pub fork: &'a Fork,
    pub root: NodeId,
    pub ingest: &'a Ingest,
    /// How many threads cut a long run.
    pub threads: usize,
    /// Work is given up, with `Interrupted`, as soon as this is not 0.
    pub wanted: Option<&'a AtomicUsize>,
    pub dense: Dense,
}

/// What becomes of pieces of a long file that look as if nothing made them smaller, and lie in the spool in a row.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dense {
    /// They are stored like all others.
    Store,
    /// They are only hashed, ahead of a commit that may let them stay where they are.
    Hash,
    /// They are noted, for whoever ends the ingest to decide.
    Note,
}

impl Source<'_> {
    /// Adds all content values of a file with their offsets. What the base has and the fork did not touch is neither read nor
    /// cut again, nor is what `begun` has of a file that is new.
    ///
    /// # Errors
    /// What the disk or the store answered; the values of the beginning may have been added then.
    pub fn values(
        &self,
        ino: Ino,
        inode: &Inode,
        base_size: u64,
        begun: Option<(&Ingested, u64)>,
        out: &mut Vec<(u64, Value)>,
    ) -> Result<(), FsError> {
        let size = inode.attr.size;
        if size == 0 {
            return Ok(());
        }
        let store = &self.fork.store;
        let root = inode.base.unwrap_or(self.root);
        let runs = view::content_runs(store, root, ino, &inode.content, 0, pages(size))?;
        let runs: Vec<(u64, u64)> = runs
            .iter()
            .map(|(page, count)| (page * PAGE, ((page + count) * PAGE).min(size)))
            .collect();
        if size <= INLINE_MAX as u64 && runs == [(0, size)] {
            out.push((0, Value::Inline(self.read(ino, inode, 0, size)?)));
            return Ok(());
        }
        if size <= SINGLE_MAX {
            for (from, to) in runs {
                out.push(self.chunk(ino, inode, from, to)?);
            }
            return Ok(());
        }
        let old = if base_size > SINGLE_MAX && !inode.created && inode.base.is_none() {
            Old::of_base(self, ino, inode, base_size)?
        } else {
            begun.map_or_else(Old::default, Old::begun)
        };
        for run in runs {
            self.cut(ino, inode, run, &old, out)?;
        }
        Ok(())
    }

    pub fn read(&self, ino: Ino, inode: &Inode, from: u64, to: u64) -> Result<Vec<u8>, FsError> {
        let mut bytes = vec![0; (to - from) as usize];
        self.read_into(ino, inode, from, &mut bytes)?;
        Ok(bytes)
    }

    pub fn read_into(
        &self,
        ino: Ino,
        inode: &Inode,
        from: u64,
        bytes: &mut [u8],
    ) -> Result<(), FsError> {
        self.fork.read_inode(inode, self.root, ino, from, bytes)
    }

    fn chunk(&self, ino: Ino, inode: &Inode, from: u64, to: u64) -> Result<(u64, Value), FsError> {
        let bytes = self.read(ino, inode, from, to)?;
        let id = self.ingest.chunk(&bytes)?;
        self.note(to - from);
        Ok((from, Value::Chunk { len: to - from, id }))
    }

    /// Stores a piece of a long file, or leaves it where it lies.
    pub(super) fn stored(&self, inode: &Inode, at: u64, bytes: &[u8]) -> Result<Value, FsError> {
        let len = bytes.len() as u64;
        let place = match self.dense {
            Dense::Store => None,
            _ => self
                .place(inode, at, len)
                .filter(|_| chunk::is_dense(bytes)),
        };
        let id = match place {
            None => self.ingest.chunk(bytes)?,
            Some(place) => {
                let id = ChunkId::of(bytes);
                match self.dense {
                    Dense::Note => self.ingest.lies(id, place)?,
                    _ => self.fork.note_hashed(id, len),
                }
                id
            }
        };
        self.note(len);
        Ok(Value::Chunk { len, id })
    }

    /// Does what is left to be done for a piece that was looked at ahead: if it was only hashed then, it is as good as new.
    pub fn again(&self, ino: Ino, inode: &Inode, at: u64, value: &Value) -> Result<(), FsError> {
        let Value::Chunk { len, id } = *value else {
            return Ok(());
        };
        if self.dense == Dense::Hash || !self.fork.is_hashed(id) {
            return Ok(());
        }
        match self.place(inode, at, len) {
            Some(place) if self.dense == Dense::Note => self.ingest.lies(id, place)?,
            _ => {
                self.ingest.chunk(&self.read(ino, inode, at, at + len)?)?;
            }
        }
        Ok(())
    }

    /// Where bytes of a file lie in the spool, if in a row.
    fn place(&self, inode: &Inode, at: u64, len: u64) -> Option<Place> {
        let offset = inode.content.in_spool(at, at + len)?;
        let spool = self.fork.id.0;
        Some(Place { spool, offset, len })
    }

    /// Notes progress of a commit; what is done ahead is none.
    pub(super) fn note(&self, len: u64) {
        if self.wanted.is_none() {
            self.fork.note_ingested(len);
        }
    }
}

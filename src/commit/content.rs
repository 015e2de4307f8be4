//! The content of one file as the tree holds it: by its bytes and holes alone, however it came to have them.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crossbeam::channel;

use crate::chunk::{self, ChunkId, INLINE_MAX, Place, SINGLE_MAX};
use crate::fork::Fork;
use crate::fork::error::FsError;
use crate::fork::extent::{PAGE, pages};
use crate::fork::table::{Ingested, Inode};
use crate::fork::view;
use crate::record::{Ino, Value};
use crate::store::Ingest;
use crate::tree::NodeId;

/// A run of data that is stored by several threads, in bytes.
const LONG: u64 = 4 << 20;

/// Where the bytes of a file come from, and where its chunks go.
pub struct Source<'a> {
    pub fork: &'a Fork,
    pub root: NodeId,
    pub ingest: &'a Ingest,
    /// How many threads store the chunks of a long run.
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
        self.fork
            .read_inode(inode, self.root, ino, from, &mut bytes)?;
        Ok(bytes)
    }

    fn make_way(&self) -> io::Result<()> {
        match self.wanted {
            Some(wanted) if wanted.load(Ordering::Relaxed) > 0 => {
                Err(io::ErrorKind::Interrupted.into())
            }
            _ => Ok(()),
        }
    }

    fn chunk(&self, ino: Ino, inode: &Inode, from: u64, to: u64) -> Result<(u64, Value), FsError> {
        let bytes = self.read(ino, inode, from, to)?;
        let id = self.ingest.chunk(&bytes)?;
        self.note(to - from);
        Ok((from, Value::Chunk { len: to - from, id }))
    }

    /// Cuts one run of data, and stores its chunks: those of a long one in several threads.
    fn cut(
        &self,
        ino: Ino,
        inode: &Inode,
        run: (u64, u64),
        old: &Old,
        out: &mut Vec<(u64, Value)>,
    ) -> Result<(), FsError> {
        if self.threads < 2 || run.1 - run.0 < LONG {
            self.cut_here(ino, inode, run, old, out)
        } else {
            self.cut_beside(ino, inode, run, old, out)
        }
    }

    fn cut_here(
        &self,
        ino: Ino,
        inode: &Inode,
        run: (u64, u64),
        old: &Old,
        out: &mut Vec<(u64, Value)>,
    ) -> Result<(), FsError> {
        self.each_piece(ino, inode, run, old, |at, piece| {
            let value = match piece {
                Piece::Known(value) => value,
                Piece::New(bytes, range) => self.stored(inode, at, &bytes[range])?,
            };
            out.push((at, value));
            Ok(())
        })
    }

    /// Cuts in this thread; others store the chunks meanwhile.
    fn cut_beside(
        &self,
        ino: Ino,
        inode: &Inode,
        run: (u64, u64),
        old: &Old,
        out: &mut Vec<(u64, Value)>,
    ) -> Result<(), FsError> {
        let mut found: Vec<(u64, Option<Value>)> = Vec::new();
        let (pieces, work) = channel::bounded::<Unstored>(self.threads);
        let stored = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..self.threads)
                .map(|_| {
                    let work = work.clone();
                    scope.spawn(move || -> Result<Vec<(usize, Value)>, FsError> {
                        crate::sys::step_back();
                        let store = |piece: Unstored| {
                            let bytes = &piece.bytes[piece.range];
                            Ok((piece.index, self.stored(inode, piece.at, bytes)?))
                        };
                        work.into_iter().map(store).collect()
                    })
                })
                .collect();
            // Whoever sends must see when all workers have failed.
            drop(work);
            let cut = self.each_piece(ino, inode, run, old, |at, piece| {
                let value = match piece {
                    Piece::Known(value) => Some(value),
                    Piece::New(bytes, range) => {
                        let index = found.len();
                        let sent = pieces.send(Unstored {
                            index,
                            at,
                            bytes,
                            range,
                        });
                        sent.map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
                        None
                    }
                };
                found.push((at, value));
                Ok(())
            });
            drop(pieces);
            let mut stored = Vec::new();
            for worker in workers {
                stored.extend(worker.join().expect("a panic ends the process")?);
            }
            cut.map(|()| stored)
        })?;
        for (index, value) in stored {
            found[index].1 = Some(value);
        }
        out.extend(
            found
                .into_iter()
                .filter_map(|(at, value)| Some((at, value?))),
        );
        Ok(())
    }

    /// Stores a piece of a long file, or leaves it where it lies.
    fn stored(&self, inode: &Inode, at: u64, bytes: &[u8]) -> Result<Value, FsError> {
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
    fn note(&self, len: u64) {
        if self.wanted.is_none() {
            self.fork.note_ingested(len);
        }
    }

    /// Goes through one run of data, piece by piece.
    fn each_piece(
        &self,
        ino: Ino,
        inode: &Inode,
        (from, to): (u64, u64),
        old: &Old,
        mut each: impl FnMut(u64, Piece) -> Result<(), FsError>,
    ) -> Result<(), FsError> {
        let mut at = from;
        let mut buffer = Arc::new(Vec::new());
        let mut start = at;
        while at < to {
            self.make_way()?;
            if let Some(value) = old.at(at, to) {
                if old.of_fork {
                    self.again(ino, inode, at, &value)?;
                    self.note(value.len());
                }
                let here = at;
                at += value.len();
                each(here, Piece::Known(value))?;
                continue;
            }
            let used = (at - start) as usize;
            let want = ((to - at) as usize).min(chunk::MAX + 1);
            if used > buffer.len() || buffer.len() - used < want {
                let end = to.min(at + 4 * chunk::MAX as u64);
                buffer = Arc::new(self.read(ino, inode, at, end)?);
                start = at;
            }
            let skip = (at - start) as usize;
            let rest = &buffer[skip..];
            let at_end = start + buffer.len() as u64 == to;
            let len = chunk::first_cut(rest, at_end).expect("enough bytes were read to decide");
            each(at, Piece::New(buffer.clone(), skip..skip + len))?;
            at += len as u64;
        }
        Ok(())
    }
}

/// A piece of a run of data.
enum Piece {
    /// What was there before, and was not touched.
    Known(Value),
    /// Bytes that are to be stored: so much of a buffer.
    New(Arc<Vec<u8>>, Range<usize>),
}

/// A new piece on its way to a thread that stores it.
struct Unstored {
    /// Its place among all pieces of the run.
    index: usize,
    /// Its offset in the file.
    at: u64,
    bytes: Arc<Vec<u8>>,
    range: Range<usize>,
}

/// The chunks that a file had before, and what was changed under them.
#[derive(Default)]
struct Old {
    /// What the fork itself wrote, and not the base.
    of_fork: bool,
    values: Vec<(u64, Value)>,
    /// Changed ranges of bytes, in order.
    dirty: Vec<(u64, u64)>,
}

impl Old {
    /// What the base has, and the fork changed.
    fn of_base(
        source: &Source<'_>,
        ino: Ino,
        inode: &Inode,
        base_size: u64,
    ) -> Result<Old, FsError> {
        let values = view::base_content(&source.fork.store, source.root, ino, 0, base_size)?;
        let mut dirty: Vec<(u64, u64)> = inode
            .content
            .extents
            .iter()
            .map(|e| (e.page * PAGE, e.end() * PAGE))
            .collect();
        let kept = (inode.content.base_pages * PAGE)
            .min(inode.attr.size)
            .min(base_size);
        dirty.push((kept, u64::MAX));
        dirty.sort_unstable();
        Ok(Old {
            of_fork: false,
            values,
            dirty,
        })
    }

    /// What was ingested ahead, and is unchanged up to a byte.
    fn begun((ingested, unchanged): (&Ingested, u64)) -> Old {
        let values = ingested.values.clone().unwrap_or_default();
        let dirty = vec![(unchanged, u64::MAX)];
        Old {
            of_fork: true,
            values,
            dirty,
        }
    }

    /// Returns the chunk that began here before, if cutting anew would give it again: its bytes and the one behind it, by which
    /// the cut was decided, are the same, and it ends the run now if and only if it did then.
    fn at(&self, at: u64, run_end: u64) -> Option<Value> {
        let index = self
            .values
            .binary_search_by_key(&at, |(offset, _)| *offset)
            .ok()?;
        let value = &self.values[index].1;
        let end = at + value.len();
        let ended_run = self
            .values
            .get(index + 1)
            .is_none_or(|(next, _)| *next != end);
        if end > run_end || (end == run_end) != ended_run {
            return None;
        }
        let seen = if end == run_end { end } else { end + 1 };
        let next = self.dirty.partition_point(|(_, to)| *to <= at);
        let touched = self.dirty.get(next).is_some_and(|(from, _)| *from < seen);
        (!touched).then(|| value.clone())
    }
}

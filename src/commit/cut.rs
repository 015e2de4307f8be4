//! One run of data becomes chunks; a long one in several threads.
//!
//! Where a chunk ends depends on where it begins, so a run is cut from its beginning to its end. But two rows of cuts that began at
//! different places mostly have one in common soon, and are the same from there on. So each thread cuts a segment of the run,
//! beginning a little before it, and the rows are joined where they meet. Where they do not, as amid zeros, which are cut by
//! length alone, what the row should have been is cut again: what comes out is always what one thread would have found.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::content::Source;
use super::in_threads;
use crate::chunk;
use crate::fork::error::FsError;
use crate::fork::extent::PAGE;
use crate::fork::table::{Ingested, Inode};
use crate::fork::view;
use crate::record::{Ino, Value};

/// A run of data that several threads cut, in bytes.
const LONG: u64 = 4 << 20;
/// Each takes no more of it at a time, in bytes.
const SEGMENT: u64 = 16 << 20;
/// So many segments for each thread are cut before they are joined, and the next begin where they end.
const EACH: usize = 4;
/// Cutting begins so long before a segment: some sixteen chunks, of which a few are enough as a rule. Segments are as many times
/// as long, in step with what is cut by length alone from where they begin.
const BEFORE: u64 = 4 * chunk::MAX as u64;
/// So much is read at a time.
const BUFFER: u64 = 4 * chunk::MAX as u64;

/// Chunks with their offsets, one behind the other.
type Row = Vec<(u64, Value)>;

impl Source<'_> {
    /// Cuts one run of data, and stores its chunks.
    ///
    /// # Errors
    /// What the disk or the store answered; in one thread, the chunks of the beginning have been added then.
    pub(super) fn cut(
        &self,
        ino: Ino,
        inode: &Inode,
        run: (u64, u64),
        old: &Old,
        out: &mut Row,
    ) -> Result<(), FsError> {
        let cutter = || Cutter {
            source: self,
            ino,
            inode,
            run,
            old,
            buffer: Vec::new(),
            start: run.0,
        };
        if self.threads < 2 || run.1 - run.0 < LONG {
            return cutter().cut(run.0, run.1, out);
        }
        let mut at = run.0;
        while at < run.1 {
            let share = (run.1 - at).div_ceil(self.threads as u64);
            let step = share.min(SEGMENT).next_multiple_of(BEFORE);
            let count = (run.1 - at).div_ceil(step) as usize;
            let segments: Vec<(u64, u64)> = (0..count.min(self.threads * EACH) as u64)
                .map(|index| at + index * step)
                .map(|from| (from, (from + step).min(run.1)))
                .collect();
            let rows = self.cut_all(&segments, cutter)?;
            let to = segments.last().map_or(run.1, |(_, to)| *to);
            let mut cutter = cutter();
            at = join((at, to), rows, out, |at| cutter.value(at))?;
        }
        Ok(())
    }

    /// Cuts segments of a run, each as if it were known where a chunk begins.
    fn cut_all<'a>(
        &self,
        segments: &[(u64, u64)],
        cutter: impl Fn() -> Cutter<'a> + Sync,
    ) -> Result<Vec<Row>, FsError> {
        let next = AtomicUsize::new(0);
        let rows = Mutex::new(vec![Row::new(); segments.len()]);
        let work = || -> Result<(), FsError> {
            let mut cutter = cutter();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(&(from, to)) = segments.get(index) else {
                    return Ok(());
                };
                let mut row = Row::new();
                let first = cutter.first_behind(from);
                let done = first.and_then(|first| cutter.cut(first, to, &mut row));
                // What one has failed at is no use to the others either.
                done.inspect_err(|_| next.store(segments.len(), Ordering::Relaxed))?;
                rows.lock()[index] = row;
            }
        };
        for done in in_threads(self.threads.min(segments.len()), work) {
            done?;
        }
        Ok(rows.into_inner())
    }
}

/// Puts rows together that each are right from the first cut on that is one of those before. Where they have none in common,
/// `again` says what begins there. Returns where the last chunk ends, which is the one across `to` or in front of it.
fn join(
    (mut at, to): (u64, u64),
    rows: Vec<Row>,
    out: &mut Row,
    mut again: impl FnMut(u64) -> Result<Value, FsError>,
) -> Result<u64, FsError> {
    for (begins, value) in rows.into_iter().flatten() {
        while at < begins {
            at = push(out, at, again(at)?);
        }
        if at == begins {
            at = push(out, at, value);
        }
    }
    while at < to {
        at = push(out, at, again(at)?);
    }
    Ok(at)
}

/// Adds the chunk that begins at `at`; returns where it ends.
fn push(out: &mut Row, at: u64, value: Value) -> u64 {
    let end = at + value.len();
    out.push((at, value));
    end
}

/// Goes through one run of data, piece by piece.
struct Cutter<'a> {
    source: &'a Source<'a>,
    ino: Ino,
    inode: &'a Inode,
    run: (u64, u64),
    old: &'a Old,
    /// What was read, from `start` on.
    buffer: Vec<u8>,
    start: u64,
}

/// A piece of a run of data.
enum Piece<'a> {
    /// What was there before, and was not touched.
    Known(Value),
    /// Bytes that are to be stored.
    New(&'a [u8]),
}

impl Cutter<'_> {
    /// Adds the chunks that begin within `[at, to)`, if one begins at `at`.
    fn cut(&mut self, mut at: u64, to: u64, out: &mut Row) -> Result<(), FsError> {
        while at < to {
            at = push(out, at, self.value(at)?);
        }
        Ok(())
    }

    /// Returns where a chunk most likely begins first, at or behind `from`.
    fn first_behind(&mut self, from: u64) -> Result<u64, FsError> {
        let least = from.saturating_sub(BEFORE).max(self.run.0);
        // Where a chunk began before that nothing has touched one most likely does now, and nothing is to be read.
        let old = self.old.last_until(from);
        let old = old.filter(|at| self.old.at(*at, self.run.1).is_some());
        let mut at = old.map_or(least, |at| at.max(least));
        while at < from {
            at += match self.piece(at)? {
                Piece::Known(value) => value.len(),
                Piece::New(bytes) => bytes.len() as u64,
            };
        }
        Ok(at)
    }

    /// Returns the chunk that begins at `at`, stored.
    fn value(&mut self, at: u64) -> Result<Value, FsError> {
        let (source, inode) = (self.source, self.inode);
        match self.piece(at)? {
            Piece::New(bytes) => source.stored(inode, at, bytes),
            Piece::Known(value) => {
                if self.old.of_fork {
                    source.again(self.ino, inode, at, &value)?;
                    source.note(value.len());
                }
                Ok(value)
            }
        }
    }

    fn piece(&mut self, at: u64) -> Result<Piece<'_>, FsError> {
        self.make_way()?;
        let to = self.run.1;
        if let Some(value) = self.old.at(at, to) {
            return Ok(Piece::Known(value));
        }
        let want = (to - at).min(chunk::MAX as u64 + 1);
        let end = self.start + self.buffer.len() as u64;
        if at < self.start || end < at + want {
            // A failed read leaves nothing that could be taken for data.
            let mut buffer = std::mem::take(&mut self.buffer);
            buffer.resize((to - at).min(BUFFER) as usize, 0);
            self.source
                .read_into(self.ino, self.inode, at, &mut buffer)?;
            (self.buffer, self.start) = (buffer, at);
        }
        let rest = &self.buffer[(at - self.start) as usize..];
        let at_end = self.start + self.buffer.len() as u64 == to;
        let len = chunk::first_cut(rest, at_end).expect("enough bytes were read to decide");
        Ok(Piece::New(&rest[..len]))
    }

    /// Fails if whoever works here is to give way.
    fn make_way(&self) -> io::Result<()> {
        match self.source.wanted {
            Some(wanted) if wanted.load(Ordering::Relaxed) > 0 => {
                Err(io::ErrorKind::Interrupted.into())
            }
            _ => Ok(()),
        }
    }
}

/// The chunks that a file had before, and what was changed under them.
#[derive(Default)]
pub struct Old {
    /// What the fork itself wrote, and not the base.
    of_fork: bool,
    values: Vec<(u64, Value)>,
    /// Changed ranges of bytes, in order.
    dirty: Vec<(u64, u64)>,
}

impl Old {
    /// What the base has, and the fork changed.
    pub fn of_base(
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
    pub fn begun((ingested, unchanged): (&Ingested, u64)) -> Old {
        let values = ingested.values.clone().unwrap_or_default();
        let dirty = vec![(unchanged, u64::MAX)];
        Old {
            of_fork: true,
            values,
            dirty,
        }
    }

    /// Where the last chunk began before, at or in front of `at`.
    fn last_until(&self, at: u64) -> Option<u64> {
        let behind = self.values.partition_point(|(offset, _)| *offset <= at);
        Some(self.values[..behind].last()?.0)
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

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::chunk::ChunkId;

    /// Where chunks may end, as content would say.
    fn ends() -> impl Strategy<Value = Vec<bool>> {
        prop_oneof![
            vec(prop::bool::weighted(0.3), 1..400),
            vec(Just(false), 1..400),
            (vec(prop::bool::weighted(0.2), 1..30), 1..12_usize).prop_map(|(v, n)| v.repeat(n)),
        ]
    }

    /// A chunk is 2 to 7 long, and ends at the first place where one may.
    fn chunk_at(ends: &[bool], at: u64) -> Value {
        let rest = ends.len() as u64 - at;
        let longest = rest.min(7);
        let len = (2..longest).find(|len| ends[(at + len) as usize]);
        let id = ChunkId::of(&at.to_le_bytes());
        Value::Chunk {
            len: len.unwrap_or(longest),
            id,
        }
    }

    fn row(ends: &[bool], mut at: u64, to: u64) -> Row {
        let mut row = Row::new();
        while at < to {
            at = push(&mut row, at, chunk_at(ends, at));
        }
        row
    }

    proptest! {
        #[test]
        fn rows_that_were_cut_in_segments_are_joined_to_what_one_thread_would_have_cut(
            ends in ends(),
            step in 1..60_u64,
            before in 0..20_u64,
            at_a_time in 1..9_u64,
        ) {
            let all = ends.len() as u64;
            let (mut at, mut joined) = (0, Row::new());
            while at < all {
                let rows = (0..at_a_time).map(|index| {
                    let from = (at + index * step).min(all);
                    let mut first = from.saturating_sub(before);
                    while first < from {
                        first += chunk_at(&ends, first).len();
                    }
                    row(&ends, first, (from + step).min(all))
                });
                let to = (at + at_a_time * step).min(all);
                at = join((at, to), rows.collect(), &mut joined, |at| Ok(chunk_at(&ends, at))).unwrap();
            }
            prop_assert_eq!(joined, row(&ends, 0, all));
        }
    }
}

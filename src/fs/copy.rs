//! copy_file_range: whole pages are shared, not copied.

use super::io::Change;
use super::{Caller, Fs, SIZE_MAX, now};
use crate::fork::error::FsError;
use crate::fork::extent::{Extent, Origin, PAGE, Piece, pages};
use crate::fork::table::{Edit, Inode};
use crate::record::{Ino, Kind};

/// What is copied byte by byte at a time, at most.
const COPY_MAX: u64 = 1 << 20;

impl Fs {
    /// Copies up to `len` bytes from one place to another; returns how many, 0 at the end of the source.
    pub fn copy_range(
        &self,
        caller: Caller,
        (source, from): (Ino, u64),
        (target, to): (Ino, u64),
        len: u64,
    ) -> Result<u64, FsError> {
        self.writable()?;
        let attr = self.getattr(source)?;
        if attr.kind != Kind::File || self.getattr(target)?.kind != Kind::File {
            return Err(FsError::Invalid);
        }
        let len = len.min(attr.size.saturating_sub(from));
        if len == 0 {
            return Ok(0);
        }
        if to.checked_add(len).is_none_or(|end| end > SIZE_MAX) {
            return Err(FsError::TooLarge);
        }
        if source == target && from < to + len && to < from + len {
            return Err(FsError::Invalid);
        }
        if from % PAGE == 0 && to % PAGE == 0 && len >= PAGE && source != target {
            let shared = self.share(caller, (source, from), (target, to), len)?;
            if shared > 0 {
                return Ok(shared);
            }
        }
        let step = if from % PAGE == to % PAGE && from % PAGE != 0 {
            // Up to the next page, so that the rest can be shared.
            len.min(PAGE - from % PAGE)
        } else {
            len.min(COPY_MAX)
        };
        let bytes = self.read(source, from, step as usize)?;
        Ok(self.write(caller, target, to, &bytes, caller.uid != 0)? as u64)
    }

    /// Shares whole pages; returns the number of bytes, 0 where only copying is possible.
    fn share(
        &self,
        caller: Caller,
        (source, from): (Ino, u64),
        (target, to): (Ino, u64),
        len: u64,
    ) -> Result<u64, FsError> {
        self.drop_capability(caller, target)?;
        let _gate = self.enter()?;
        let in_doubt = {
            let layers = self.fork.layers();
            if layers.frozen.is_some() {
                // What the base's pages are called is about to change.
                return Ok(0);
            }
            layers.in_doubt
        };
        let root = self.fork.root();
        let (a, b) = (self.fork.cell(source)?, self.fork.cell(target)?);
        let (Some(a), Some(b)) = (a, b) else {
            return Err(FsError::Stale);
        };
        let (mut inode, mut other);
        if source < target {
            inode = a.state.write();
            other = b.state.write();
        } else {
            other = b.state.write();
            inode = a.state.write();
        }
        if inode.base.is_some() || other.base.is_some() {
            return Ok(0);
        }
        // A last page in part can be shared only where it becomes the last page of the target too.
        let len = len.min(inode.attr.size.saturating_sub(from));
        let len = if to + len >= other.attr.size && from + len == inode.attr.size {
            len
        } else {
            len - len % PAGE
        };
        if len == 0 {
            return Ok(0);
        }
        let (first, last) = (from / PAGE, pages(from + len));
        let shift = |page: u64| page - first + to / PAGE;
        let (gain, kept) = shared_pieces(&inode, source, first, last, shift);
        let of_another =
            |extent: &Extent| matches!(extent.origin, Origin::Base { ino, .. } if ino != source);
        if in_doubt && gain.iter().any(of_another) {
            return Ok(0);
        }

        let mut change = Change::new(self, &other, root.id, target);
        if to > other.attr.size {
            change.zero_tail(&mut other, to / PAGE)?;
        }
        let (start, end) = (shift(first), shift(last));
        let had = change.data_pages(&other, start, end)?;
        let source_change = Change::new(self, &inode, root.id, source);
        let has = source_change.data_pages(&inode, first, last)?;
        change.attr.blocks = change.attr.blocks + has * 8 - had * 8;
        let time = now();
        change.attr.size = change.attr.size.max(to + len);
        change.attr.mtime = time;
        change.attr.ctime = time;
        if caller.uid != 0 {
            change.attr.kill_suidgid();
        }
        if !kept.is_empty() {
            let edits: Vec<Edit> = kept
                .iter()
                .map(|e| Edit::Extent {
                    ino: source,
                    extent: *e,
                })
                .collect();
            self.fork.spool.retain(kept.iter().copied());
            if let Err(error) = self.fork.edit(caller.request, &mut inode, &edits) {
                self.fork.spool.release(kept);
                return Err(error);
            }
        }
        change.take(gain);
        change.finish(caller, &mut other)?;
        Ok(len)
    }
}

/// Returns what the target gets for pages `[first, last)`, and what the source has of the spool there from now on: room that two
/// inodes have is neither's to write in place. The log may say otherwise though memory does not, so all of that is logged again.
fn shared_pieces(
    inode: &Inode,
    source: Ino,
    first: u64,
    last: u64,
    shift: impl Fn(u64) -> u64,
) -> (Vec<Extent>, Vec<Extent>) {
    let (mut gain, mut kept) = (Vec::new(), Vec::new());
    for piece in inode.content.pieces(first, last) {
        let (page, pages, origin) = match piece {
            Piece::Hole { page, pages } => (page, pages, Origin::Hole { reserved: false }),
            Piece::Base { page, pages } => (page, pages, Origin::Base { ino: source, page }),
            Piece::Extent(extent) => {
                let mut origin = extent.origin;
                if let Origin::Spool { at, .. } = origin {
                    origin = Origin::Spool { at, owned: false };
                    kept.push(Extent { origin, ..extent });
                }
                (extent.page, extent.pages, origin)
            }
        };
        gain.push(Extent {
            page: shift(page),
            pages,
            origin,
        });
    }
    (gain, kept)
}

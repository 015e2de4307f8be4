//! Content: read, write, truncate, fallocate, lseek.

use super::{Caller, Fs, SIZE_MAX, now};
use crate::fork::error::FsError;
use crate::fork::extent::{Extent, Origin, PAGE, Piece, pages};
use crate::fork::table::{Edit, Inode};
use crate::fork::view::{self, InodeView};
use crate::record::{Attr, Ino, Kind};
use crate::tree::NodeId;

/// The most room that a growing file gets ahead: 8 MiB.
const AHEAD_MAX: u64 = 2048;

/// What fallocate does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Allocate {
    /// Room for data that comes later; reads as zeros.
    Reserve { keep_size: bool },
    /// FALLOC_FL_PUNCH_HOLE
    Punch,
    /// FALLOC_FL_ZERO_RANGE
    Zero { keep_size: bool },
}

/// What lseek looks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Seek {
    Data,
    Hole,
}

impl Fs {
    /// Reads up to `size` bytes at `offset`: fewer at the end of the file.
    pub fn read(&self, ino: Ino, offset: u64, size: usize) -> Result<Vec<u8>, FsError> {
        let mut buffer = vec![0; size];
        let done = self.read_into(ino, offset, &mut buffer)?;
        buffer.truncate(done);
        Ok(buffer)
    }

    /// Fills a buffer with what is at `offset`; returns how much that is: less at the end of the file.
    pub fn read_into(&self, ino: Ino, offset: u64, buffer: &mut [u8]) -> Result<usize, FsError> {
        let _looking = self.look()?;
        match self.view(ino)? {
            InodeView::Base(attr, root) => {
                let size = clip(&attr, offset, buffer.len())?;
                view::read_base(&self.fork.store, root.id, ino, offset, &mut buffer[..size])?;
                Ok(size)
            }
            InodeView::Changed(cell, root) => {
                // Held while the spool is read: so the room cannot become another file's meanwhile.
                let inode = cell.state.read();
                let size = clip(&inode.attr, offset, buffer.len())?;
                self.fork
                    .read_inode(&inode, root.id, ino, offset, &mut buffer[..size])?;
                Ok(size)
            }
        }
    }

    /// Writes `data` at `offset`, and clears suid and sgid where the kernel says that the writer loses them. Returns how much was
    /// written: a beginning, where the rest failed.
    pub fn write(
        &self,
        caller: Caller,
        ino: Ino,
        offset: u64,
        data: &[u8],
        kill_suidgid: bool,
    ) -> Result<usize, FsError> {
        self.write_to(caller, ino, Some(offset), data, kill_suidgid)
    }

    /// Writes `data` at the end, wherever that is by now: the end that one kernel knows is not the end where another writes too.
    pub fn append(
        &self,
        caller: Caller,
        ino: Ino,
        data: &[u8],
        kill_suidgid: bool,
    ) -> Result<usize, FsError> {
        self.write_to(caller, ino, None, data, kill_suidgid)
    }

    /// Writes `data` at `offset`, or at the end.
    fn write_to(
        &self,
        caller: Caller,
        ino: Ino,
        offset: Option<u64>,
        data: &[u8],
        kill_suidgid: bool,
    ) -> Result<usize, FsError> {
        self.writable()?;
        self.drop_capability(caller, ino)?;
        let _gate = self.enter()?;
        let root = self.fork.root();
        let cell = self.fork.cell(ino)?.ok_or(FsError::Stale)?;
        let mut inode = cell.state.write();
        if inode.attr.kind != Kind::File {
            return Err(FsError::Invalid);
        }
        if data.is_empty() {
            return Ok(0);
        }
        let offset = offset.unwrap_or(inode.attr.size);
        let end = offset.checked_add(data.len() as u64);
        end.filter(|end| *end <= SIZE_MAX)
            .ok_or(FsError::TooLarge)?;
        let mut change = Change::new(self, &inode, root.id, ino);
        if offset > inode.attr.size {
            change.zero_tail(&mut inode, offset / PAGE)?;
        }
        let written = change.write(&mut inode, offset, data)?;
        let time = now();
        let attr = &mut change.attr;
        attr.size = attr.size.max(offset + written as u64);
        attr.mtime = time;
        attr.ctime = time;
        if kill_suidgid {
            attr.kill_suidgid();
        }
        change.finish(caller, &mut inode)?;
        Ok(written)
    }

    /// Cuts or lengthens a file; new bytes are a hole.
    pub(super) fn truncate(&self, caller: Caller, ino: Ino, size: u64) -> Result<(), FsError> {
        let _gate = self.enter()?;
        let root = self.fork.root();
        let cell = self.fork.cell(ino)?.ok_or(FsError::Stale)?;
        let mut inode = cell.state.write();
        match inode.attr.kind {
            Kind::File => {}
            Kind::Directory => return Err(FsError::IsDirectory),
            _ => return Err(FsError::Invalid),
        }
        let mut change = Change::new(self, &inode, root.id, ino);
        if size > inode.attr.size {
            change.zero_tail(&mut inode, u64::MAX)?;
        } else {
            let end = pages(size);
            let cut = change.data_pages(&inode, end, pages(inode.attr.size))?;
            change.attr.blocks -= cut * 8;
            change.edits.push(Edit::Truncate { ino, page: end });
        }
        let time = now();
        change.attr.size = size;
        change.attr.mtime = time;
        change.attr.ctime = time;
        if caller.uid != 0 {
            change.attr.kill_suidgid();
        }
        if let Some((at, pages)) = inode.ahead.take() {
            self.fork.spool.give_back(at, pages);
        }
        change.finish(caller, &mut inode)
    }

    /// Reserves room, punches a hole, or zeroes a range.
    pub fn fallocate(
        &self,
        caller: Caller,
        ino: Ino,
        offset: u64,
        len: u64,
        mode: Allocate,
    ) -> Result<(), FsError> {
        self.writable()?;
        if len == 0 {
            return Err(FsError::Invalid);
        }
        let end = offset
            .checked_add(len)
            .filter(|end| *end <= SIZE_MAX)
            .ok_or(FsError::TooLarge)?;
        self.drop_capability(caller, ino)?;
        let _gate = self.enter()?;
        let root = self.fork.root();
        let cell = self.fork.cell(ino)?.ok_or(FsError::Stale)?;
        let mut inode = cell.state.write();
        match inode.attr.kind {
            Kind::File => {}
            Kind::Directory => return Err(FsError::IsDirectory),
            _ => return Err(FsError::NotSupported),
        }
        let mut change = Change::new(self, &inode, root.id, ino);
        let keep_size = match mode {
            Allocate::Reserve { keep_size } | Allocate::Zero { keep_size } => keep_size,
            Allocate::Punch => true,
        };
        if !keep_size && end > inode.attr.size {
            let before = match mode {
                Allocate::Reserve { .. } => u64::MAX,
                Allocate::Punch | Allocate::Zero { .. } => offset / PAGE,
            };
            change.zero_tail(&mut inode, before)?;
            change.attr.size = end;
        }
        // Like a write: whoever may only write takes from the file what it granted.
        let time = now();
        change.attr.mtime = time;
        change.attr.ctime = time;
        if caller.uid != 0 {
            change.attr.kill_suidgid();
        }
        match mode {
            Allocate::Reserve { .. } => change.reserve(&inode, offset / PAGE, pages(end))?,
            Allocate::Punch | Allocate::Zero { .. } => {
                let reserved = mode != Allocate::Punch;
                change.zero(&mut inode, offset, end, reserved)?;
            }
        }
        change.finish(caller, &mut inode)
    }

    /// Returns where the next data or hole begins at or behind `offset`.
    pub fn lseek(&self, ino: Ino, offset: u64, what: Seek) -> Result<u64, FsError> {
        let _looking = self.look()?;
        let view = self.view(ino)?;
        let store = &self.fork.store;
        let (size, runs) = match view {
            InodeView::Base(attr, root) => {
                let end = pages(attr.size);
                (
                    attr.size,
                    view::base_runs(store, root.id, ino, offset / PAGE, end)?,
                )
            }
            InodeView::Changed(cell, root) => {
                let inode = cell.state.read();
                let root = inode.base.unwrap_or(root.id);
                let end = pages(inode.attr.size);
                let runs =
                    view::content_runs(store, root, ino, &inode.content, offset / PAGE, end)?;
                (inode.attr.size, runs)
            }
        };
        if offset >= size {
            return Err(FsError::NoSuchOffset);
        }
        match what {
            Seek::Data => {
                let first = runs.first().ok_or(FsError::NoSuchOffset)?;
                Ok((first.0 * PAGE).max(offset))
            }
            Seek::Hole => {
                let mut at = offset;
                for (page, pages) in runs {
                    if page * PAGE > at {
                        break;
                    }
                    at = (page + pages) * PAGE;
                }
                Ok(at.min(size))
            }
        }
    }
}

fn clip(attr: &Attr, offset: u64, size: usize) -> Result<usize, FsError> {
    if !attr.kind.has_content() {
        return Err(if attr.kind == Kind::Directory {
            FsError::IsDirectory
        } else {
            FsError::Invalid
        });
    }
    Ok((attr.size.saturating_sub(offset)).min(size as u64) as usize)
}

/// A change of one inode's content in the making: bytes go to the spool at once, edits are collected, and nothing is shown
/// before [`Change::finish`] has logged them. Dropped unfinished, it gives the new room back.
pub(super) struct Change<'a> {
    pub fs: &'a Fs,
    pub ino: Ino,
    pub attr: Attr,
    pub edits: Vec<Edit>,
    root: NodeId,
    taken: Vec<Extent>,
}

impl<'a> Change<'a> {
    pub fn new(fs: &'a Fs, inode: &Inode, root: NodeId, ino: Ino) -> Change<'a> {
        Change {
            fs,
            ino,
            attr: inode.attr.clone(),
            edits: Vec::new(),
            root,
            taken: Vec::new(),
        }
    }

    /// Counts the pages of `[from, to)` that hold data.
    pub fn data_pages(&self, inode: &Inode, from: u64, to: u64) -> Result<u64, FsError> {
        if inode.attr.blocks == pages(inode.attr.size) * 8 {
            // A file without holes: no need to ask the base.
            return Ok(to.min(pages(inode.attr.size)).saturating_sub(from));
        }
        let root = inode.base.unwrap_or(self.root);
        let store = &self.fs.fork.store;
        let runs = view::content_runs(store, root, self.ino, &inode.content, from, to)?;
        Ok(runs.iter().map(|(_, pages)| pages).sum())
    }

    /// Makes the bytes behind the end of the file zero up to the end of its last page, before the file grows: they would show.
    /// What writes or zeroes from page `before` or an earlier one on does that page itself.
    pub fn zero_tail(&mut self, inode: &mut Inode, before: u64) -> Result<(), FsError> {
        let size = inode.attr.size;
        let page = size / PAGE;
        if size.is_multiple_of(PAGE) || before <= page {
            return Ok(());
        }
        match inode.content.pieces(page, page + 1).first() {
            None | Some(Piece::Hole { .. }) => Ok(()),
            Some(Piece::Extent(Extent {
                origin: Origin::Spool { at, owned: true },
                ..
            })) => {
                let zeros = vec![0; (PAGE - size % PAGE) as usize];
                inode.content.touch(page);
                Ok(self.fs.fork.spool.write(&zeros, at * PAGE + size % PAGE)?)
            }
            // A hole of the base stays one: it is zero, and a page put there would have to be counted.
            Some(_) if self.data_pages(inode, page, page + 1)? == 0 => Ok(()),
            Some(_) => {
                let mut bytes = vec![0; PAGE as usize];
                let used = (size % PAGE) as usize;
                self.fs.fork.read_inode(
                    inode,
                    self.root,
                    self.ino,
                    page * PAGE,
                    &mut bytes[..used],
                )?;
                self.place(inode, page, &bytes)
            }
        }
    }

    /// Writes bytes: in place where the inode owns the room, to new room elsewhere. What changed in place has changed, so where
    /// only a beginning could be written it is that which counts; returns its length.
    pub fn write(&mut self, inode: &mut Inode, offset: u64, data: &[u8]) -> Result<usize, FsError> {
        let mut at = offset / PAGE;
        match self.write_parts(inode, &mut at, offset, data) {
            Ok(()) => Ok(data.len()),
            Err(_) if at * PAGE > offset => Ok((at * PAGE - offset) as usize),
            Err(error) => Err(error),
        }
    }

    /// Writes one part after the other, and moves `at` to the page behind each that is done.
    fn write_parts(
        &mut self,
        inode: &mut Inode,
        at: &mut u64,
        offset: u64,
        data: &[u8],
    ) -> Result<(), FsError> {
        let end = offset + data.len() as u64;
        let last = pages(end);
        // Bytes change in place, without an edit that says so.
        inode.content.touch(*at);
        for extent in inode.content.extents.within(*at, last) {
            let Origin::Spool {
                at: room,
                owned: true,
            } = extent.origin
            else {
                continue;
            };
            self.write_new(inode, *at, extent.page, offset, data)?;
            *at = extent.page;
            let from = (extent.page * PAGE).max(offset);
            let to = (extent.end() * PAGE).min(end);
            let skip = from - extent.page * PAGE;
            let size = inode.attr.size;
            let gap = size.max(extent.page * PAGE);
            if gap < from {
                // Between the old end and the write, within the page.
                let zeros = vec![0; (from - gap) as usize];
                self.fs
                    .fork
                    .spool
                    .write(&zeros, room * PAGE + (gap - extent.page * PAGE))?;
            }
            let bytes = &data[(from - offset) as usize..(to - offset) as usize];
            self.fs.fork.spool.write(bytes, room * PAGE + skip)?;
            *at = extent.end();
        }
        self.write_new(inode, *at, last, offset, data)
    }

    /// Writes the part of `data` that falls into pages `[from, to)`, none of which the inode owns.
    fn write_new(
        &mut self,
        inode: &mut Inode,
        from: u64,
        to: u64,
        offset: u64,
        data: &[u8],
    ) -> Result<(), FsError> {
        if from >= to {
            return Ok(());
        }
        let end = offset + data.len() as u64;
        let start = from * PAGE;
        let stop = (to * PAGE).min(end.max(inode.attr.size));
        if start >= offset && stop <= end {
            return self.place(
                inode,
                from,
                &data[(start - offset) as usize..(stop - offset) as usize],
            );
        }
        // The first or the last page is written in part: the rest of it is what it was.
        let mut bytes = vec![0; (stop - start) as usize];
        let known = (inode.attr.size.min(stop)).saturating_sub(start) as usize;
        if start < offset {
            let head = known.min((offset - start) as usize);
            self.fs
                .fork
                .read_inode(inode, self.root, self.ino, start, &mut bytes[..head])?;
        }
        if stop > end && known as u64 > end - start {
            let tail = (end - start) as usize;
            self.fs
                .fork
                .read_inode(inode, self.root, self.ino, end, &mut bytes[tail..known])?;
        }
        let (a, b) = (start.max(offset), stop.min(end));
        bytes[(a - start) as usize..(b - start) as usize]
            .copy_from_slice(&data[(a - offset) as usize..(b - offset) as usize]);
        self.place(inode, from, &bytes)
    }

    /// Writes bytes to new room, to stand at `page` and behind it, and counts the blocks that the file has more.
    fn place(&mut self, inode: &mut Inode, page: u64, bytes: &[u8]) -> Result<(), FsError> {
        let count = pages(bytes.len() as u64);
        let blocks = (count - self.data_pages(inode, page, page + count)?) * 8;
        let reserved: u64 = inode
            .content
            .extents
            .within(page, page + count)
            .iter()
            .filter(|e| e.origin == Origin::Hole { reserved: true })
            .map(|e| e.pages)
            .sum();
        let fork = &self.fs.fork;
        if count > reserved {
            fork.want_pages(count - reserved)?;
        }
        let at = self.room(inode, page, count);
        let extent = Extent {
            page,
            pages: count,
            origin: Origin::Spool { at, owned: true },
        };
        if let Err(error) = fork.spool.write(bytes, at * PAGE) {
            fork.spool.release([extent]);
            return Err(error.into());
        }
        self.taken.push(extent);
        self.attr.blocks += blocks;
        self.edits.push(Edit::Extent {
            ino: self.ino,
            extent,
        });
        Ok(())
    }

    /// Takes room for `count` pages at `page`: what was taken ahead, if the file grows there, so that it lies in a row.
    fn room(&self, inode: &mut Inode, page: u64, count: u64) -> u64 {
        let spool = &self.fs.fork.spool;
        let before = page
            .checked_sub(1)
            .and_then(|p| inode.content.extents.within(p, page).pop());
        let growing = page >= pages(inode.attr.size) && page > 0;
        if let Some((at, left)) = inode.ahead.take() {
            let follows = matches!(before, Some(Extent { origin: Origin::Spool { at: last, .. }, .. }) if last + 1 == at);
            if follows && left >= count {
                inode.ahead = (left > count).then_some((at + count, left - count));
                spool.claim(count);
                return at;
            }
            spool.give_back(at, left);
        }
        let ahead = if growing { page.clamp(1, AHEAD_MAX) } else { 0 };
        let at = spool.allocate(count, ahead);
        if ahead > 0 {
            inode.ahead = Some((at + count, ahead));
        }
        at
    }

    /// Reserves the holes of `[from, to)`, those of the base too.
    fn reserve(&mut self, inode: &Inode, from: u64, to: u64) -> Result<(), FsError> {
        let root = inode.base.unwrap_or(self.root);
        let (store, content) = (&self.fs.fork.store, &inode.content);
        let mut held = view::content_runs(store, root, self.ino, content, from, to)?;
        let reserved = content.extents.within(from, to).into_iter();
        let reserved = reserved.filter(|e| e.origin == Origin::Hole { reserved: true });
        held.extend(reserved.map(|e| (e.page, e.pages)));
        held.sort_unstable();
        let (mut wanted, mut at) = (0, from);
        for (page, pages) in held.into_iter().chain([(to, 0)]) {
            if at < page {
                wanted += page - at;
                let extent = Extent {
                    page: at,
                    pages: page - at,
                    origin: Origin::Hole { reserved: true },
                };
                self.edits.push(Edit::Extent {
                    ino: self.ino,
                    extent,
                });
            }
            at = page + pages;
        }
        self.fs.fork.want_pages(wanted)?;
        self.retain_edits();
        Ok(())
    }

    /// Zeroes bytes `[from, to)`: whole pages become a hole, parts of pages that hold data are overwritten.
    fn zero(
        &mut self,
        inode: &mut Inode,
        from: u64,
        to: u64,
        reserved: bool,
    ) -> Result<(), FsError> {
        let size = self.attr.size.max(inode.attr.size);
        let first = from.div_ceil(PAGE);
        let last = if to >= size {
            pages(to.max(size)).max(first)
        } else {
            to / PAGE
        };
        if first > last {
            return self.zero_part(inode, from, to);
        }
        self.zero_part(inode, from, (first * PAGE).min(to))?;
        if to < size {
            self.zero_part(inode, (last * PAGE).max(from), to)?;
        }
        let last = if reserved {
            last.min(pages(to))
        } else {
            last.min(pages(size))
        };
        if first >= last {
            return Ok(());
        }
        if reserved {
            self.fs.fork.want_pages(last - first)?;
        }
        self.attr.blocks -= self.data_pages(inode, first, last)? * 8;
        let extent = Extent {
            page: first,
            pages: last - first,
            origin: Origin::Hole { reserved },
        };
        self.edits.push(Edit::Extent {
            ino: self.ino,
            extent,
        });
        self.retain_edits();
        Ok(())
    }

    /// Overwrites part of one page with zeros, if it holds data: also behind the old end, where the file grows over it.
    fn zero_part(&mut self, inode: &mut Inode, from: u64, to: u64) -> Result<(), FsError> {
        let to = to.min(self.attr.size);
        if from >= to || self.data_pages(inode, from / PAGE, from / PAGE + 1)? == 0 {
            return Ok(());
        }
        // Within one page: all of it, or nothing.
        self.write(inode, from, &vec![0; (to - from) as usize])
            .map(drop)
    }

    /// Becomes the owner of the reserved holes among the edits.
    fn retain_edits(&mut self) {
        let holes = self.edits.iter().filter_map(|edit| match edit {
            Edit::Extent { extent, .. } if extent.origin == Origin::Hole { reserved: true } => {
                Some(*extent)
            }
            _ => None,
        });
        let holes: Vec<Extent> = holes.collect();
        self.fs.fork.spool.retain(holes.iter().copied());
        self.taken.extend(holes);
    }

    /// Puts extents that other inodes have too.
    pub fn take(&mut self, extents: Vec<Extent>) {
        self.fs.fork.spool.retain(extents.iter().copied());
        let edit = |extent: &Extent| Edit::Extent {
            ino: self.ino,
            extent: *extent,
        };
        let edits: Vec<Edit> = extents.iter().map(edit).collect();
        self.edits.extend(edits);
        self.taken.extend(extents);
    }

    /// Logs the change and shows it.
    pub fn finish(mut self, caller: Caller, inode: &mut Inode) -> Result<(), FsError> {
        let attr = self.fs.shown(self.attr.clone());
        self.edits.push(Edit::Attr {
            ino: self.ino,
            attr,
        });
        self.fs.fork.edit(caller.request, inode, &self.edits)?;
        self.taken.clear();
        // The size alone may have changed, which ends a piece elsewhere.
        inode.content.sequence += 1;
        inode.written = self.fs.fork.age();
        Ok(())
    }
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        if !self.taken.is_empty() {
            self.fs.fork.spool.release(self.taken.drain(..));
        }
    }
}

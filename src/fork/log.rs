//! The log: the journal of a fork's table, a row of segments with one record a mutation.
//!
//! A record is appended with one write(2) before its mutation is answered, unsynced: it survives the end of the daemon, not of
//! the machine. A short append is cut off again before the next one, for everything behind a torn record would be lost.
//! The disk's room for the next records is taken ahead, so that files can be removed from a fork when the disk is full.
//!
//! ```text
//! segment   "FVLOG\0\0\x01" ‖ fork id (u64 LE) ‖ number (u64 LE) ‖ record*
//! record    length of the body (u32 LE) ‖ CRC-32 of the body (u32 LE) ‖ body
//! body      epoch ‖ unique (varints) ‖ edit*
//! ```

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::table::Edit;
use crate::chunk::varint;

const MAGIC: &[u8; 8] = b"FVLOG\0\0\x01";
const HEADER: u64 = 24;
/// The largest body that is written, and so that is believed: far more than any one change needs.
const BODY_MAX: usize = 16 << 20;
/// What is logged as several records is begun anew in the next one behind this.
const BODY_FULL: usize = 1 << 20;
/// Room that is taken ahead at a time, in bytes. The second half is always there: for a thousand removals on a full disk.
const ROOM: u64 = 256 << 10;
/// Where there is none it is asked for again so many bytes later.
const LATER: u64 = 16 << 10;

/// Names a request of the kernel: the number of the session and the kernel's own number; (0, 0) for the daemon's own edits.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Request {
    pub epoch: u64,
    pub unique: u64,
}

#[derive(Debug)]
pub struct Log {
    dir: PathBuf,
    fork: u64,
    number: u64,
    file: File,
    /// Where the next record goes; what lies behind is not part of the log.
    end: u64,
    /// When it ends here room is to be taken.
    want_at: u64,
    /// Bytes of records in the segments before this one that are still needed.
    before: u64,
    /// A failed append could not be cut off: nothing may be appended any more.
    broken: bool,
    buffer: Vec<u8>,
}

/// What is wrong with a segment.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("{0}: {1}")]
    Io(PathBuf, #[source] io::Error),
    #[error("{path} is damaged at byte {at}: {why}")]
    Damaged {
        path: PathBuf,
        at: u64,
        why: &'static str,
    },
}

/// Where a segment of the log of a fork lies.
pub fn segment(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("log-{number:08}"))
}

impl Log {
    /// Begins segment `number` of a fork in `dir`.
    pub fn create(dir: &Path, fork: u64, number: u64) -> io::Result<Log> {
        let mut log = Log::begin_segment(dir, fork, number)?;
        log.want_room();
        Ok(log)
    }

    /// Begins a segment that has no room ahead yet.
    fn begin_segment(dir: &Path, fork: u64, number: u64) -> io::Result<Log> {
        let path = segment(dir, number);
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)?;
        if let Err(error) = file.write_all_at(&header(fork, number), 0) {
            // The segment before it is the last one still, whose last record may be torn.
            fs::remove_file(&path)?;
            return Err(error);
        }
        Ok(Log::at(dir, fork, number, file, HEADER, 0))
    }

    /// Goes on at `end` of a segment.
    fn at(dir: &Path, fork: u64, number: u64, file: File, end: u64, before: u64) -> Log {
        Log {
            dir: dir.into(),
            fork,
            number,
            file,
            end,
            want_at: end,
            before,
            broken: false,
            buffer: Vec::new(),
        }
    }

    /// Replays all segments from `first` on through `apply`, cuts a torn last record off, and goes on behind it.
    ///
    /// # Errors
    /// `Damaged` for everything that is not as it was written: nothing is cut off then, and nothing passed over.
    pub fn replay(
        dir: &Path,
        fork: u64,
        first: u64,
        mut apply: impl FnMut(Request, Vec<Edit>),
    ) -> Result<Log, LogError> {
        let mut number = first;
        let mut before = 0;
        let newest = newest(dir)?;
        loop {
            let path = segment(dir, number);
            if newest.is_none_or(|newest| newest < number) || !path.exists() {
                let why = "the segment is missing";
                return Err(LogError::Damaged { path, at: 0, why });
            }
            let last = newest == Some(number);
            if last && number > first && is_begun(&path, fork, number)? {
                let log = Log::create(dir, fork, number).map_err(|e| LogError::Io(path, e))?;
                return Ok(Log { before, ..log });
            }
            let end = read_segment(&path, fork, number, last, &mut apply)?;
            if last {
                let io = |e| LogError::Io(path.clone(), e);
                let file = File::options().write(true).open(&path).map_err(io)?;
                cut(&file, end).map_err(io)?;
                let mut log = Log::at(dir, fork, number, file, end, before);
                log.want_room();
                return Ok(log);
            }
            before += end - HEADER;
            number += 1;
        }
    }

    /// Appends one record.
    ///
    /// # Errors
    /// What the write failed with; the log is then as it was before, or refuses everything from now on. A record longer than a
    /// replay takes is refused likewise.
    pub fn append<'a>(
        &mut self,
        request: Request,
        edits: impl IntoIterator<Item = &'a Edit>,
    ) -> io::Result<()> {
        self.begin(request);
        for edit in edits {
            edit.encode_to(&mut self.buffer);
        }
        self.write()
    }

    /// Appends edits that need not be replayed all or none, however many: as records of the daemon's own.
    ///
    /// # Errors
    /// As [`Log::append`]; some of the edits may be in the log then.
    pub fn append_in_parts<'a>(
        &mut self,
        edits: impl IntoIterator<Item = &'a Edit>,
    ) -> io::Result<()> {
        self.begin(Request::default());
        let empty = self.buffer.len();
        for edit in edits {
            edit.encode_to(&mut self.buffer);
            if self.buffer.len() > BODY_FULL {
                self.write()?;
                self.begin(Request::default());
            }
        }
        if self.buffer.len() > empty {
            self.write()?;
        }
        Ok(())
    }

    fn begin(&mut self, request: Request) {
        self.buffer.clear();
        self.buffer.resize(8, 0);
        varint::put(&mut self.buffer, request.epoch);
        varint::put(&mut self.buffer, request.unique);
    }

    /// Writes the record that the buffer holds.
    fn write(&mut self) -> io::Result<()> {
        if self.broken {
            return Err(io::Error::other(
                "the log of the fork could not be repaired after a failed write",
            ));
        }
        let body = &self.buffer[8..];
        if body.len() > BODY_MAX {
            let why = format!(
                "a change of {} bytes is longer than the log of a fork takes",
                body.len()
            );
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        let (len, crc) = (body.len() as u32, crc32fast::hash(body));
        self.buffer[..4].copy_from_slice(&len.to_le_bytes());
        self.buffer[4..8].copy_from_slice(&crc.to_le_bytes());
        match self.file.write_at(&self.buffer, self.end) {
            Ok(n) if n == self.buffer.len() => {
                self.end += n as u64;
                self.want_room();
                Ok(())
            }
            result => {
                if cut(&self.file, self.end).is_err() {
                    self.broken = true;
                }
                self.want_at = self.end;
                self.want_room();
                Err(result
                    .err()
                    .unwrap_or_else(|| io::ErrorKind::StorageFull.into()))
            }
        }
    }

    /// Takes room ahead when half of it is gone. Without it the log goes on for as long as the disk has some.
    fn want_room(&mut self) {
        if self.end < self.want_at {
            return;
        }
        self.want_at = match crate::sys::take_room(&self.file, self.end, ROOM) {
            Ok(()) => self.end + ROOM / 2,
            Err(error) if error.kind() == io::ErrorKind::Unsupported => u64::MAX,
            Err(_) => self.end + LATER,
        };
    }

    /// Begins the next segment and returns its number.
    pub fn next_segment(&mut self) -> io::Result<u64> {
        let mut next = Log::begin_segment(&self.dir, self.fork, self.number + 1)?;
        next.before = self.len();
        // Nothing comes behind the end of this one any more: what it has there may be all that is left. If it stays the next one
        // goes without.
        self.file.set_len(self.end).unwrap_or_default();
        next.want_room();
        *self = next;
        Ok(self.number)
    }

    /// Bytes of records that a replay would read.
    pub fn len(&self) -> u64 {
        self.before + self.end - HEADER
    }

    /// Whether a replay would find no record.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Notes that the segments before the one that is written are not needed any more.
    pub fn begins_here(&mut self) {
        self.before = 0;
    }
}

/// Cuts off what lies behind `end`. A file that ends there is left alone, for it would lose its room ahead.
fn cut(file: &File, end: u64) -> io::Result<()> {
    match file.metadata()?.len() == end {
        true => Ok(()),
        false => file.set_len(end),
    }
}

/// What a segment begins with.
fn header(fork: u64, number: u64) -> Vec<u8> {
    [&MAGIC[..], &fork.to_le_bytes(), &number.to_le_bytes()].concat()
}

/// Whether a segment has no more than the beginning of its header: the daemon ended while it made it.
fn is_begun(path: &Path, fork: u64, number: u64) -> Result<bool, LogError> {
    let io = |e| LogError::Io(path.into(), e);
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(io)?;
    file.take(HEADER).read_to_end(&mut bytes).map_err(io)?;
    let header = header(fork, number);
    Ok(bytes.len() < header.len() && header.starts_with(&bytes))
}

/// The number of the segment that a file is.
fn number_of(entry: &fs::DirEntry) -> Option<u64> {
    let name = entry.file_name();
    let number = name.to_str()?.strip_prefix("log-")?.parse().ok()?;
    (*name == *segment(Path::new(""), number)).then_some(number)
}

/// The number of the last segment that there is.
fn newest(dir: &Path) -> Result<Option<u64>, LogError> {
    let io = |e| LogError::Io(dir.into(), e);
    let mut newest = None;
    for entry in fs::read_dir(dir).map_err(io)? {
        newest = newest.max(number_of(&entry.map_err(io)?));
    }
    Ok(newest)
}

/// Removes the segments of `dir` before `first`.
pub fn remove_before(dir: &Path, first: u64) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if number_of(&entry).is_some_and(|n| n < first) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Feeds the records of one segment to `apply` and returns where the last whole one ends.
fn read_segment(
    path: &Path,
    fork: u64,
    number: u64,
    last: bool,
    apply: &mut impl FnMut(Request, Vec<Edit>),
) -> Result<u64, LogError> {
    let io = |e| LogError::Io(path.into(), e);
    let damaged = |at, why| LogError::Damaged {
        path: path.into(),
        at,
        why,
    };
    let file = File::open(path).map_err(io)?;
    let len = file.metadata().map_err(io)?.len();
    let mut reader = io::BufReader::with_capacity(1 << 20, file);
    if len < HEADER {
        return Err(damaged(0, "its header is cut off"));
    }
    let mut header = [0; HEADER as usize];
    reader.read_exact(&mut header).map_err(io)?;
    if header[..] != self::header(fork, number)[..] {
        return Err(damaged(
            0,
            "its header is not that of this fork and segment",
        ));
    }
    let mut at = HEADER;
    let mut body = Vec::new();
    while at < len {
        // A record that ends at or behind the end of the last segment may be torn; a bad one before that is damage.
        let torn_or = |reaches: u64, why| {
            if last && reaches >= len {
                Ok(at)
            } else {
                Err(damaged(at, why))
            }
        };
        if len - at < 8 {
            return torn_or(len, "a record is cut off");
        }
        let mut head = [0; 8];
        reader.read_exact(&mut head).map_err(io)?;
        let (size, crc) = head.split_at(4);
        let size = u32::from_le_bytes(size.try_into().expect("four bytes")) as usize;
        let crc = u32::from_le_bytes(crc.try_into().expect("four bytes"));
        let end = at + 8 + size as u64;
        if size > BODY_MAX {
            return Err(damaged(at, "a record is longer than any can be"));
        }
        body.clear();
        let here = (len - at - 8).min(size as u64);
        (&mut reader)
            .take(here)
            .read_to_end(&mut body)
            .map_err(io)?;
        if end > len || crc32fast::hash(&body) != crc {
            if holds_record(&body, crc) {
                return Err(damaged(at, "the length of a record is wrong"));
            }
            let why = if end > len {
                "a record is cut off"
            } else {
                "the checksum of a record is wrong"
            };
            return torn_or(end, why);
        }
        let (request, edits) =
            decode(&body).ok_or_else(|| damaged(at, "a record cannot be read"))?;
        apply(request, edits);
        at = end;
    }
    Ok(at)
}

/// Whether a whole record begins here that is shorter than is said of it. A torn record is the beginning of one and holds none;
/// a damaged length is not to take all records behind it along.
fn holds_record(bytes: &[u8], crc: u32) -> bool {
    let mut hash = crc32fast::Hasher::new();
    bytes.iter().enumerate().any(|(at, byte)| {
        hash.update(std::slice::from_ref(byte));
        hash.clone().finalize() == crc && decode(&bytes[..=at]).is_some()
    })
}

fn decode(mut body: &[u8]) -> Option<(Request, Vec<Edit>)> {
    let request = Request {
        epoch: varint::take(&mut body)?,
        unique: varint::take(&mut body)?,
    };
    let mut edits = Vec::new();
    while !body.is_empty() {
        edits.push(Edit::take(&mut body)?);
    }
    Some((request, edits))
}

#[cfg(test)]
pub(crate) mod tests;

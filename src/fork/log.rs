//! The log: the journal of a fork's table, a row of segments with one record a mutation.
//!
//! A record is appended with one write(2) before its mutation is answered, unsynced: it survives the end of the daemon, not of
//! the machine. A short append is cut off again before the next one, for everything behind a torn record would be lost.
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
/// The largest body that is believed: a bit more than the largest extended attribute needs.
const BODY_MAX: usize = 16 << 20;

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

fn segment(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("log-{number:08}"))
}

impl Log {
    /// Begins segment `number` of a fork in `dir`.
    pub fn create(dir: &Path, fork: u64, number: u64) -> io::Result<Log> {
        let path = segment(dir, number);
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)?;
        let mut header = MAGIC.to_vec();
        header.extend_from_slice(&fork.to_le_bytes());
        header.extend_from_slice(&number.to_le_bytes());
        if let Err(error) = file.write_all_at(&header, 0) {
            // The segment before it is the last one still, whose last record may be torn.
            fs::remove_file(&path)?;
            return Err(error);
        }
        Ok(Log {
            dir: dir.into(),
            fork,
            number,
            file,
            end: HEADER,
            before: 0,
            broken: false,
            buffer: Vec::new(),
        })
    }

    /// Replays all segments from `first` on through `apply`, cuts a torn last record off, and goes on behind it.
    pub fn replay(
        dir: &Path,
        fork: u64,
        first: u64,
        mut apply: impl FnMut(Request, Vec<Edit>),
    ) -> Result<Log, LogError> {
        let mut number = first;
        let mut before = 0;
        if !segment(dir, first).exists() {
            let path = segment(dir, first);
            return Log::create(dir, fork, first).map_err(|e| LogError::Io(path, e));
        }
        loop {
            let path = segment(dir, number);
            let last = !segment(dir, number + 1).exists();
            if last && number > first && is_unfinished(&path) {
                let mut log = Log::create(dir, fork, number).map_err(|e| LogError::Io(path, e))?;
                log.before = before;
                return Ok(log);
            }
            let end = read_segment(&path, fork, number, last, &mut apply)?;
            if last {
                let io = |e| LogError::Io(path.clone(), e);
                let file = File::options().write(true).open(&path).map_err(io)?;
                file.set_len(end).map_err(io)?;
                let dir = dir.into();
                return Ok(Log {
                    dir,
                    fork,
                    number,
                    file,
                    end,
                    before,
                    broken: false,
                    buffer: Vec::new(),
                });
            }
            before += end - HEADER;
            number += 1;
        }
    }

    /// Appends one record.
    ///
    /// # Errors
    /// What the write failed with; the log is then as it was before, or refuses everything from now on.
    pub fn append<'a>(
        &mut self,
        request: Request,
        edits: impl IntoIterator<Item = &'a Edit>,
    ) -> io::Result<()> {
        if self.broken {
            return Err(io::Error::other(
                "the log of the fork could not be repaired after a failed write",
            ));
        }
        self.buffer.clear();
        self.buffer.resize(8, 0);
        varint::put(&mut self.buffer, request.epoch);
        varint::put(&mut self.buffer, request.unique);
        for edit in edits {
            edit.encode_to(&mut self.buffer);
        }
        let body = &self.buffer[8..];
        let (len, crc) = (body.len() as u32, crc32fast::hash(body));
        self.buffer[..4].copy_from_slice(&len.to_le_bytes());
        self.buffer[4..8].copy_from_slice(&crc.to_le_bytes());
        match self.file.write_at(&self.buffer, self.end) {
            Ok(n) if n == self.buffer.len() => {
                self.end += n as u64;
                Ok(())
            }
            result => {
                if self.file.set_len(self.end).is_err() {
                    self.broken = true;
                }
                Err(result
                    .err()
                    .unwrap_or_else(|| io::ErrorKind::StorageFull.into()))
            }
        }
    }

    /// Begins the next segment and returns its number.
    pub fn next_segment(&mut self) -> io::Result<u64> {
        let mut next = Log::create(&self.dir, self.fork, self.number + 1)?;
        next.before = self.len();
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

/// Whether the process ended while it began a segment: it has no record then, and the log goes on in it.
fn is_unfinished(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.len() < HEADER)
}

/// Removes the segments of `dir` before `first`.
pub fn remove_before(dir: &Path, first: u64) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let number = name
            .to_str()
            .and_then(|n| n.strip_prefix("log-"))
            .and_then(|n| n.parse::<u64>().ok());
        if number.is_some_and(|n| n < first) {
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
    let mut header = [0; HEADER as usize];
    if len < HEADER {
        return Err(damaged(0, "its header is cut off"));
    }
    reader.read_exact(&mut header).map_err(io)?;
    let ours = [&MAGIC[..], &fork.to_le_bytes(), &number.to_le_bytes()].concat();
    if header[..] != ours[..] {
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
        if end > len {
            return torn_or(end, "a record is cut off");
        }
        if size > BODY_MAX {
            return Err(damaged(at, "a record is longer than any can be"));
        }
        body.resize(size, 0);
        reader.read_exact(&mut body).map_err(io)?;
        if crc32fast::hash(&body) != crc {
            return torn_or(end, "the checksum of a record is wrong");
        }
        let (request, edits) =
            decode(&body).ok_or_else(|| damaged(at, "a record cannot be read"))?;
        apply(request, edits);
        at = end;
    }
    Ok(at)
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
mod tests {
    use super::*;
    use crate::record::Ino;

    fn edits(n: u64) -> Vec<Edit> {
        vec![
            Edit::Truncate {
                ino: Ino(n),
                page: n,
            },
            Edit::Orphan { ino: Ino(n) },
        ]
    }

    fn written(dir: &Path, records: u64) -> Log {
        let mut log = Log::create(dir, 7, 1).unwrap();
        for n in 1..=records {
            log.append(
                Request {
                    epoch: 1,
                    unique: n,
                },
                &edits(n),
            )
            .unwrap();
        }
        log
    }

    fn replayed(dir: &Path) -> Result<(Vec<u64>, Log), LogError> {
        let mut seen = Vec::new();
        let log = Log::replay(dir, 7, 1, |request, found| {
            assert_eq!(found, edits(request.unique));
            seen.push(request.unique);
        })?;
        Ok((seen, log))
    }

    #[test]
    fn replay_gives_back_every_record_of_every_segment_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = written(dir.path(), 3);
        assert_eq!(log.next_segment().unwrap(), 2);
        log.append(
            Request {
                epoch: 1,
                unique: 4,
            },
            &edits(4),
        )
        .unwrap();
        let (seen, mut log) = replayed(dir.path()).unwrap();
        assert_eq!(seen, [1, 2, 3, 4]);
        log.append(
            Request {
                epoch: 2,
                unique: 5,
            },
            &edits(5),
        )
        .unwrap();
        assert_eq!(replayed(dir.path()).unwrap().0, [1, 2, 3, 4, 5]);
    }

    #[test]
    fn a_log_cut_anywhere_keeps_every_whole_record_and_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        written(dir.path(), 3);
        let path = segment(dir.path(), 1);
        let whole = fs::read(&path).unwrap();
        for end in HEADER as usize..whole.len() {
            fs::write(&path, &whole[..end]).unwrap();
            let (seen, mut log) = replayed(dir.path()).unwrap();
            log.append(
                Request {
                    epoch: 1,
                    unique: 9,
                },
                &edits(9),
            )
            .unwrap();
            assert_eq!(
                replayed(dir.path()).unwrap().0,
                [seen, vec![9]].concat(),
                "{end} bytes"
            );
        }
    }

    #[test]
    fn a_segment_whose_making_was_cut_off_is_begun_again() {
        for len in 0..HEADER {
            let dir = tempfile::tempdir().unwrap();
            written(dir.path(), 3).next_segment().unwrap();
            let next = File::options()
                .write(true)
                .open(segment(dir.path(), 2))
                .unwrap();
            next.set_len(len).unwrap();
            let (seen, mut log) = replayed(dir.path()).unwrap();
            assert_eq!(seen, [1, 2, 3], "{len} bytes");
            let four = Request {
                epoch: 1,
                unique: 4,
            };
            log.append(four, &edits(4)).unwrap();
            assert_eq!(replayed(dir.path()).unwrap().0, [1, 2, 3, 4]);
            fs::remove_file(segment(dir.path(), 1)).unwrap();
            assert_eq!(log.number, 2);
        }
    }

    #[test]
    fn damage_before_the_last_record_is_reported_and_never_cut() {
        let dir = tempfile::tempdir().unwrap();
        written(dir.path(), 3);
        let path = segment(dir.path(), 1);
        let whole = fs::read(&path).unwrap();
        for at in [0, 9, 17, HEADER as usize + 4, HEADER as usize + 9] {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            fs::write(&path, &bytes).unwrap();
            assert!(
                matches!(replayed(dir.path()), Err(LogError::Damaged { .. })),
                "byte {at}"
            );
            assert_eq!(fs::read(&path).unwrap(), bytes);
        }
    }
}

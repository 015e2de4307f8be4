//! The end of the database's WAL after a crash of the machine.
//!
//! A record is a checksum (4 bytes), a length (2) and a kind (1) before its bytes; none crosses a block of 32 KiB. RocksDB stops
//! at what is no record; but where a kind is one that only recycled logs have, it looks at the same place for ever. So what is no
//! record is cut off before RocksDB sees it.
//!
//! What a crash cut short has no whole record behind it, but for pages that a power cut kept from the disk, which read as zeros.
//! Anything else with a whole record behind it is damage, which RocksDB would pass over with all commits behind it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::StoreError;

const BLOCK: usize = 32 << 10;
const PAGE: usize = 4096;
const HEADER: usize = 7;
/// What our settings let RocksDB write: full, first, middle, last.
const KINDS: std::ops::RangeInclusive<u8> = 1..=4;

/// Cuts every segment of the WAL in `dir` off where its records end. Nobody may have the database open.
///
/// # Errors
/// `Corrupt` if a record is damaged, and nothing has changed then; what the disk answered.
pub fn trim(dir: &Path) -> Result<(), StoreError> {
    let io = |source| StoreError::Io {
        what: dir.display().to_string(),
        source,
    };
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(io)?,
    };
    let mut torn = Vec::new();
    for entry in entries {
        let path = entry.map_err(io)?.path();
        if path.extension().is_some_and(|extension| extension == "log") {
            let open = File::options().read(true).write(true).open(&path);
            let file = open.map_err(io)?;
            let len = file.metadata().map_err(io)?.len();
            match end_of_records(&file, len).map_err(io)? {
                End::At(end) if end < len => torn.push((path, file, end, len)),
                End::At(_) => {}
                End::Damaged(at) => {
                    let name = path.display();
                    return Err(StoreError::Corrupt {
                        what: format!(
                            "{name} is wrong at byte {at}, before commits that are whole (without that file the store is as it was before all of them)"
                        ),
                    });
                }
            }
        }
    }
    for (path, file, end, len) in torn {
        log::warn!(
            "{}: {} bytes behind the last record are cut off",
            path.display(),
            len - end
        );
        file.set_len(end).map_err(io)?;
    }
    Ok(())
}

/// How much all segments of the WAL in `dir` hold; nothing of what cannot be seen.
pub fn len(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let segments = entries.filter(|e| e.path().extension().is_some_and(|x| x == "log"));
    segments
        .filter_map(|e| Some(e.metadata().ok()?.len()))
        .sum()
}

/// Where the records of a segment end.
enum End {
    At(u64),
    /// What is there is none, and whole ones follow.
    Damaged(u64),
}

fn end_of_records(file: &File, len: u64) -> io::Result<End> {
    let mut buffer = vec![0; BLOCK];
    let mut bad = None;
    for start in (0..len).step_by(BLOCK) {
        let size = usize::try_from(len - start).map_or(BLOCK, |left| left.min(BLOCK));
        let block = &mut buffer[..size];
        file.read_exact_at(block, start)?;
        if let Some(bad) = bad {
            // A record begins with each block.
            if record(block).is_some() {
                return Ok(End::Damaged(bad));
            }
            continue;
        }
        let mut at = 0;
        while let Some(size) = record(&block[at..]) {
            at += size;
        }
        let end = start + at as u64;
        if size - at < HEADER {
            // A header would not fit into the block, so there is none.
            match size {
                BLOCK => continue,
                _ => return Ok(End::At(end)),
            }
        }
        if is_hole(block, at) {
            return Ok(End::At(end));
        }
        if is_passed(&block[at..]) || is_mislabelled(&block[at..]) {
            return Ok(End::Damaged(end));
        }
        bad = Some(end);
    }
    Ok(End::At(bad.unwrap_or(len)))
}

/// How long a record is as its header has it, if that can be.
fn length(bytes: &[u8]) -> Option<usize> {
    let header = bytes.first_chunk::<HEADER>()?;
    let len = HEADER + usize::from(u16::from_le_bytes([header[4], header[5]]));
    (KINDS.contains(&header[6]) && len <= bytes.len()).then_some(len)
}

/// How long the record is that these bytes begin with, if they do and it is whole.
fn record(bytes: &[u8]) -> Option<usize> {
    let len = length(bytes)?;
    let stored = u32::from_le_bytes(*bytes.first_chunk()?);
    (checksum(&bytes[HEADER - 1..len]) == stored).then_some(len)
}

/// Whether a whole record follows where what is none here says that it ends, or one more behind that. What it holds is not looked
/// at: a commit may well hold bytes that read as a record.
fn is_passed(bytes: &[u8]) -> bool {
    let mut rest = bytes;
    while let Some(header) = rest.first_chunk::<HEADER>() {
        let len = HEADER + usize::from(u16::from_le_bytes([header[4], header[5]]));
        let Some(behind) = rest.get(len..) else {
            return false;
        };
        if record(behind).is_some() {
            return true;
        }
        rest = behind;
    }
    false
}

/// Whether this is a whole record but for its length. The beginning of one has no checksum that fits.
fn is_mislabelled(bytes: &[u8]) -> bool {
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER>() else {
        return false;
    };
    let stored = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    let mut crc = crc32c::crc32c(&header[HEADER - 1..]);
    let is_empty = masked(crc) == stored;
    let fits = |byte: &u8| {
        crc = crc32c::crc32c_append(crc, std::slice::from_ref(byte));
        masked(crc) == stored
    };
    KINDS.contains(&header[6]) && (is_empty || rest.iter().any(fits))
}

/// Whether a page on which there should be some of a record reads as zeros from there on.
fn is_hole(block: &[u8], at: usize) -> bool {
    let end = length(&block[at..]).map_or(block.len(), |len| at + len);
    let mut pages = (at / PAGE..end.div_ceil(PAGE)).map(|page| {
        let (from, to) = (page * PAGE, (page + 1) * PAGE);
        &block[from.max(at)..to.min(block.len())]
    });
    pages.any(|page| page.iter().all(|byte| *byte == 0))
}

/// RocksDB's checksum of a record's kind and bytes: CRC-32C, masked.
fn checksum(bytes: &[u8]) -> u32 {
    masked(crc32c::crc32c(bytes))
}

fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Store, StoreOptions};

    /// A record of this kind with so many bytes.
    fn made(kind: u8, bytes: usize) -> Vec<u8> {
        holding(kind, &vec![7; bytes])
    }

    fn holding(kind: u8, bytes: &[u8]) -> Vec<u8> {
        let out = [&[kind], bytes].concat();
        let sum = checksum(&out).to_le_bytes();
        let len = u16::try_from(bytes.len()).unwrap().to_le_bytes();
        [&sum[..], &len, &out].concat()
    }

    /// What is left of a log; nothing if it is damaged.
    fn trimmed(content: &[u8]) -> Option<usize> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("000007.log");
        fs::write(&path, content).unwrap();
        let whole = trim(dir.path());
        let left = fs::read(&path).unwrap();
        match whole {
            Ok(()) => assert!(content.starts_with(&left)),
            Err(error) => {
                assert!(matches!(error, StoreError::Corrupt { .. }), "{error}");
                assert!(left == content);
                return None;
            }
        }
        Some(left.len())
    }

    #[test]
    fn a_whole_log_stays_as_it_is() {
        let mut log = made(1, 100);
        log.extend(made(2, BLOCK - 107 - 7 - 3));
        log.extend([0; 3]);
        log.extend(made(3, BLOCK - 7));
        log.extend(made(4, 0));
        assert_eq!(trimmed(&log), Some(log.len()));
        assert_eq!(trimmed(b""), Some(0));
    }

    #[test]
    fn what_is_no_record_is_cut_off_with_all_behind_it() {
        let whole = made(1, 100);
        let noise: Vec<u8> = (0..3 * BLOCK).map(|n| (n * n % 251) as u8 | 1).collect();
        for kind in [0, 1, 5, 6, 7, 8, 9, 11, 130, 131, 255] {
            let mut bad = made(kind, 20);
            bad[8] ^= u8::from(kind == 1);
            for behind in [&b""[..], &noise] {
                let log = [&whole[..], &bad, behind].concat();
                assert_eq!(trimmed(&log), Some(whole.len()), "{kind}");
            }
        }
        let too_long = [whole.clone(), made(1, 40_000)].concat();
        assert_eq!(trimmed(&too_long), Some(whole.len()));
        for end in whole.len() + 1..2 * whole.len() {
            let log = [whole.clone(), whole.clone()].concat();
            assert_eq!(trimmed(&log[..end]), Some(whole.len()), "{end}");
        }
    }

    #[test]
    fn a_record_that_was_cut_short_is_cut_off_even_if_it_holds_whole_ones() {
        let whole = made(1, 100);
        let hostile = [made(1, 0), made(4, 30)].concat().repeat(200);
        let log = [&whole[..], &holding(1, &hostile)].concat();
        assert_eq!(trimmed(&log), Some(log.len()));
        for end in (whole.len() + 1..log.len()).step_by(13) {
            assert_eq!(trimmed(&log[..end]), Some(whole.len()), "{end}");
        }
        let mut damaged = [&log[..], &whole].concat();
        damaged[whole.len() + 20] ^= 1;
        assert_eq!(trimmed(&damaged), None);
    }

    #[test]
    fn pages_that_never_reached_the_disk_are_no_damage() {
        let mut log = made(1, 100);
        log.extend(made(2, BLOCK - 2 * HEADER - 100));
        log.extend(made(4, 100));
        assert_eq!(trimmed(&log), Some(log.len()));
        for (page, left) in [(0, 0), (1, 107), (7, 107)] {
            let mut log = log.clone();
            log[page * PAGE..(page + 1) * PAGE].fill(0);
            assert_eq!(trimmed(&log), Some(left), "{page}");
        }
    }

    /// A store that was not ended, with this number of commits in its log.
    fn log_of(dir: &Path, records: u64) -> (std::path::PathBuf, Vec<u8>) {
        let store = Store::open(dir, StoreOptions::default()).unwrap();
        for n in 0..records {
            store.create_volume(&format!("v{n}"), 5).unwrap();
        }
        let logs = fs::read_dir(dir.join("db")).unwrap();
        let logs = logs.map(|entry| entry.unwrap().path());
        let log = logs.filter(|path| path.extension().is_some_and(|e| e == "log"));
        let log = log.max().unwrap();
        let content = fs::read(&log).unwrap();
        drop(store);
        (log, content)
    }

    #[test]
    fn a_changed_byte_of_a_log_is_damage_unless_it_may_be_a_torn_last_record() {
        let dir = tempfile::tempdir().unwrap();
        let (_, log) = log_of(dir.path(), 5);
        assert_eq!(trimmed(&log), Some(log.len()));
        let mut last = 0;
        while let Some(size) = record(&log[last..]).filter(|size| last + size < log.len()) {
            last += size;
        }
        for at in 0..log.len() {
            let mut log = log.clone();
            log[at] ^= 1 << (at % 8);
            // A length that is wrong shows by the checksum.
            let is_length = (last + 4..last + 6).contains(&at);
            let left = (at >= last && !is_length).then_some(last);
            assert_eq!(trimmed(&log), left, "byte {at} of {}", log.len());
        }
        for at in (0..last).step_by(97) {
            let (path, changed) = log_of(&dir.path().join(at.to_string()), 5);
            let mut changed = changed;
            changed[at] ^= 1;
            fs::write(&path, &changed).unwrap();
            let opened = Store::open(&dir.path().join(at.to_string()), StoreOptions::default());
            assert!(
                matches!(opened, Err(StoreError::Unreadable { .. })),
                "byte {at}"
            );
            assert!(fs::read(&path).unwrap() == changed);
        }
    }

    #[test]
    fn a_store_opens_whatever_its_log_ends_with() {
        for kind in [0, 1, 5, 6, 7, 8, 9, 11, 130, 131, 255] {
            let dir = tempfile::tempdir().unwrap();
            let (log, _) = log_of(dir.path(), 1);
            let mut garbage = made(kind, 50);
            garbage[20] ^= 1;
            let end = fs::metadata(&log).unwrap().len();
            let file = File::options().write(true).open(&log).unwrap();
            file.write_all_at(&garbage.repeat(3), end).unwrap();
            let store = Store::open(dir.path(), StoreOptions::default()).unwrap();
            assert!(store.volume("v0").unwrap().is_some(), "{kind}");
        }
    }
}

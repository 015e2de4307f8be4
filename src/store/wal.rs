//! The end of the database's WAL after a crash of the machine.
//!
//! A record is a checksum (4 bytes), a length (2) and a kind (1) before its bytes; none crosses a block of 32 KiB. RocksDB stops
//! at what is no record; but where a kind is one that only recycled logs have, it looks at the same place for ever. So what is no
//! record is cut off before RocksDB sees it, with all behind it, which is what it would have passed over.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

const BLOCK: u64 = 32 << 10;
const HEADER: u64 = 7;
/// What our settings let RocksDB write: full, first, middle, last.
const KINDS: std::ops::RangeInclusive<u8> = 1..=4;

/// Cuts every segment of the WAL in `dir` off where its records end. Nobody may have the database open.
///
/// # Errors
/// What the disk answered.
pub fn trim(dir: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "log") {
            let file = File::options().read(true).write(true).open(&path)?;
            let len = file.metadata()?.len();
            let end = end_of_records(&file, len)?;
            if end < len {
                log::warn!(
                    "{}: {} bytes behind the last record are cut off",
                    path.display(),
                    len - end
                );
                file.set_len(end)?;
            }
        }
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

/// Where the records of a segment end, as far as their headers tell. A record that is not whole yet ends it too.
fn end_of_records(file: &File, len: u64) -> io::Result<u64> {
    let mut at = 0;
    while at < len {
        let left = BLOCK - at % BLOCK;
        if left < HEADER {
            at += left;
            continue;
        }
        if len - at < HEADER {
            return Ok(at);
        }
        let mut header = [0; HEADER as usize];
        file.read_exact_at(&mut header, at)?;
        let size = HEADER + u64::from(u16::from_le_bytes([header[4], header[5]]));
        if !KINDS.contains(&header[6]) || size > left || size > len - at {
            return Ok(at);
        }
        at += size;
    }
    Ok(len)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A record of this kind with so many bytes.
    fn record(kind: u8, bytes: usize) -> Vec<u8> {
        let mut out = vec![9; 4];
        out.extend_from_slice(&u16::try_from(bytes).unwrap().to_le_bytes());
        out.push(kind);
        out.resize(out.len() + bytes, 7);
        out
    }

    fn trimmed(content: &[u8]) -> usize {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("000007.log");
        fs::write(&path, content).unwrap();
        trim(dir.path()).unwrap();
        let left = fs::read(&path).unwrap();
        assert!(content.starts_with(&left));
        left.len()
    }

    #[test]
    fn a_whole_log_stays_as_it_is() {
        let mut log = record(1, 100);
        log.extend(record(2, BLOCK as usize - 107 - 7 - 3));
        log.extend([0; 3]);
        log.extend(record(3, BLOCK as usize - 7));
        log.extend(record(4, 0));
        assert_eq!(trimmed(&log), log.len());
        assert_eq!(trimmed(b""), 0);
    }

    #[test]
    fn what_is_no_record_is_cut_off_with_all_behind_it() {
        let whole = record(1, 100);
        for kind in [0, 5, 6, 7, 8, 9, 11, 130, 131, 255] {
            let log = [whole.clone(), record(kind, 20), whole.clone()].concat();
            assert_eq!(trimmed(&log), whole.len(), "{kind}");
        }
        let too_long = [whole.clone(), record(1, 40_000)].concat();
        assert_eq!(trimmed(&too_long), whole.len());
        for end in whole.len() + 1..2 * whole.len() {
            let log = [whole.clone(), whole.clone()].concat();
            assert_eq!(trimmed(&log[..end]), whole.len(), "{end}");
        }
    }

    #[test]
    fn a_store_opens_whatever_its_log_ends_with() {
        use crate::store::{Store, StoreOptions};
        for kind in [0, 1, 5, 6, 7, 8, 9, 11, 130, 131, 255] {
            let dir = tempfile::tempdir().unwrap();
            let store = Store::open(dir.path(), StoreOptions::default()).unwrap();
            store.create_volume("v", 5).unwrap();
            drop(store);
            let log = fs::read_dir(dir.path().join("db"))
                .unwrap()
                .map(|entry| entry.unwrap().path())
                .filter(|path| path.extension().is_some_and(|e| e == "log"))
                .max()
                .unwrap();
            let garbage = record(kind, 50).repeat(3);
            let end = fs::metadata(&log).unwrap().len();
            let file = File::options().write(true).open(&log).unwrap();
            file.write_all_at(&garbage, end).unwrap();
            let store = Store::open(dir.path(), StoreOptions::default()).unwrap();
            assert!(store.volume("v").unwrap().is_some(), "{kind}");
        }
    }
}

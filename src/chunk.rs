//! Chunks: pieces of file content named by the BLAKE3 of their bytes, where they are cut, and how they are stored.
//!
//! Pure: no IO. Cutting depends on the bytes alone, so equal content gives equal chunks wherever it lies.

mod dictionary;

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::sync::Arc;

pub use dictionary::{Dictionary, Packer, SAMPLED, SIZE_MAX as DICTIONARY_MAX, SMALL};

use fastcdc::v2020::{FastCDC, Normalization};
use zstd::bulk::{Compressor, Decompressor};

/// Content up to this length stands in the tree itself.
pub const INLINE_MAX: usize = 1024;
/// A file up to this length is not cut: each run of its data is one chunk.
pub const SINGLE_MAX: u64 = 128 << 10;
/// The least, average and most length of a chunk that is cut.
pub const MIN: usize = 16 << 10;
pub const AVG: usize = 64 << 10;
pub const MAX: usize = 256 << 10;

/// Writes an id as hex digits.
pub(crate) fn fmt_hex(id: &[u8; 32], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    id.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

/// The BLAKE3 of a chunk's bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkId(pub [u8; 32]);

impl ChunkId {
    /// Returns the id of these bytes.
    pub fn of(bytes: &[u8]) -> ChunkId {
        ChunkId(*blake3::hash(bytes).as_bytes())
    }
}

impl fmt::Display for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt_hex(&self.0, f)
    }
}

impl fmt::Debug for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt_hex(&self.0, f)
    }
}

/// Returns the length of the first chunk of `data`, or `None` if bytes behind it must be seen to decide, because `data` is
/// not the end of the run and shorter than the longest chunk and the byte after it.
pub fn first_cut(data: &[u8], at_end: bool) -> Option<usize> {
    if data.len() <= MAX && !at_end {
        return None;
    }
    if data.is_empty() {
        return Some(0);
    }
    let (min, avg, max) = (MIN as u32, AVG as u32, MAX as u32);
    let cutter = FastCDC::with_level_and_seed(data, min, avg, max, Normalization::Level2, 0);
    Some(cutter.cut(0, data.len()).1)
}

/// Unsigned numbers in seven-bit groups, least first; only the shortest form is valid.
pub mod varint {
    /// Appends a number.
    pub fn put(out: &mut Vec<u8>, mut number: u64) {
        while number >= 0x80 {
            out.push(number as u8 | 0x80);
            number >>= 7;
        }
        out.push(number as u8);
    }

    /// Takes a number from the front of `bytes`; `None` if there is no valid one.
    pub fn take(bytes: &mut &[u8]) -> Option<u64> {
        let mut number = 0_u64;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = bytes.split_first()?;
            *bytes = rest;
            let part = u64::from(byte & 0x7f);
            if shift == 63 && part > 1 {
                return None;
            }
            number |= part << shift;
            if byte < 0x80 {
                return (byte != 0 || shift == 0).then_some(number);
            }
        }
        None
    }
}

/// How a value is stored.
const RAW: u8 = 0;
const ZSTD: u8 = 1;
const DICT: u8 = 2;
const KEPT: u8 = 3;

/// Why a stored value cannot be read.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PackError {
    #[error("its head is not valid")]
    Head,
    #[error("its codec {0} is not known to this version")]
    Codec(u8),
    #[error("the dictionary {0} that it is packed with is missing or damaged")]
    Dictionary(u64),
    #[error("it is said to be longer than any can be")]
    TooLong,
    #[error("it cannot be decompressed")]
    Payload,
}

// Making a context costs more than using it on a small value, so each thread keeps its own.
thread_local! {
    static COMPRESSOR: RefCell<Option<(i32, Compressor<'static>)>> = const { RefCell::new(None) };
    static DECOMPRESSOR: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

fn compress(raw: &[u8], level: i32) -> io::Result<Vec<u8>> {
    COMPRESSOR.with_borrow_mut(|kept| {
        let fitting = kept.take().filter(|(of, _)| *of == level);
        let made = fitting.map_or_else(|| Compressor::new(level).map(|new| (level, new)), Ok)?;
        kept.insert(made).1.compress(raw)
    })
}

fn decompress(stored: &[u8], len: usize) -> io::Result<Vec<u8>> {
    DECOMPRESSOR.with_borrow_mut(|kept| {
        let made = kept.take().map_or_else(Decompressor::new, Ok)?;
        kept.insert(made).decompress(stored, len)
    })
}

/// Values from this length on are looked at before they are compressed, in bytes.
const LONG: usize = 16 << 10;
/// A sample of one of these has so many bytes,
const SAMPLE: usize = 1 << 10;
/// and with more bits a byte than this in four of them it is taken for one that does not compress: noise has 7.95.
const DENSE: f32 = 7.8;

/// Whether a long value looks as if it were compressed already: archives, images, what is encrypted. To try takes as long as all
/// the rest of storing it.
pub fn is_dense(raw: &[u8]) -> bool {
    if raw.len() < LONG {
        return false;
    }
    let mut counts = [0_u32; 256];
    let samples = raw.chunks(raw.len() / 4).take(4);
    for byte in samples.flat_map(|part| &part[..SAMPLE]) {
        counts[usize::from(*byte)] += 1;
    }
    let total = (4 * SAMPLE) as f32;
    let share = |count: &u32| *count as f32 / total;
    let seen = counts.iter().filter(|count| **count > 0).map(share);
    seen.map(|share| -share * share.log2()).sum::<f32>() > DENSE
}

/// Returns the stored form of `raw`: codec ‖ raw length ‖ payload, compressed by zstd at `level` if that makes it smaller and it
/// does not look as if it could not.
pub fn pack(raw: &[u8], level: i32) -> Vec<u8> {
    let mut out = Vec::with_capacity(raw.len() / 2 + 16);
    out.push(ZSTD);
    varint::put(&mut out, raw.len() as u64);
    let head = out.len();
    if !is_dense(raw)
        && let Ok(packed) = compress(raw, level)
        && packed.len() < raw.len()
    {
        out.extend_from_slice(&packed);
        return out;
    }
    out.truncate(head);
    out[0] = RAW;
    out.extend_from_slice(raw);
    out
}

/// Returns the raw bytes of a stored value of at most `max` bytes, packed without a dictionary.
pub fn unpack(stored: &[u8], max: usize) -> Result<Vec<u8>, PackError> {
    unpack_with(stored, max, |_| None)
}

/// Returns the raw bytes of a stored value of at most `max` bytes; `find` knows dictionaries.
pub fn unpack_with(
    mut stored: &[u8],
    max: usize,
    find: impl FnOnce(u64) -> Option<Arc<Dictionary>>,
) -> Result<Vec<u8>, PackError> {
    let (&codec, rest) = stored.split_first().ok_or(PackError::Head)?;
    stored = rest;
    let len = varint::take(&mut stored).ok_or(PackError::Head)?;
    let len = usize::try_from(len)
        .ok()
        .filter(|len| *len <= max)
        .ok_or(PackError::TooLong)?;
    let raw = match codec {
        RAW => stored.to_vec(),
        ZSTD => decompress(stored, len).map_err(|_| PackError::Payload)?,
        DICT => {
            let id = varint::take(&mut stored).ok_or(PackError::Head)?;
            let dictionary = find(id).ok_or(PackError::Dictionary(id))?;
            dictionary.decompress(stored, len)?
        }
        other => return Err(PackError::Codec(other)),
    };
    if raw.len() == len {
        Ok(raw)
    } else {
        Err(PackError::Payload)
    }
}

/// Where the raw bytes of a chunk lie that stays in the spool to which a fork wrote it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// The number of the fork.
    pub spool: u64,
    /// In bytes.
    pub offset: u64,
    /// In bytes.
    pub len: u64,
}

impl Place {
    /// Returns the stored form of a chunk that lies here: codec ‖ raw length ‖ spool ‖ offset.
    pub fn stored(&self) -> Vec<u8> {
        let mut out = vec![KEPT];
        varint::put(&mut out, self.len);
        self.put(&mut out);
        out
    }

    /// Appends spool ‖ offset.
    pub fn put(&self, out: &mut Vec<u8>) {
        varint::put(out, self.spool);
        varint::put(out, self.offset);
    }

    /// Takes spool ‖ offset, which must be all there is, for so many bytes.
    pub fn take(mut bytes: &[u8], len: u64) -> Option<Place> {
        let spool = varint::take(&mut bytes)?;
        let offset = varint::take(&mut bytes)?;
        let end = offset.checked_add(len)?;
        (bytes.is_empty() && end <= i64::MAX as u64).then_some(Place { spool, offset, len })
    }

    /// Returns where a stored value of at most `max` bytes says that they lie; `None` if it holds them itself.
    pub fn of(stored: &[u8], max: usize) -> Result<Option<Place>, PackError> {
        let Some(mut rest) = stored.strip_prefix(&[KEPT]) else {
            return Ok(None);
        };
        let len = varint::take(&mut rest).ok_or(PackError::Head)?;
        if len > max as u64 {
            return Err(PackError::TooLong);
        }
        Place::take(rest, len).map(Some).ok_or(PackError::Head)
    }
}

#[cfg(test)]
mod tests;

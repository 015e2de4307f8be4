//! Dictionaries: what many values have in common, so that each is stored without it. And the careful compression of values that stay,
//! with a dictionary or without.

use std::cell::RefCell;
use std::fmt;

use zstd::bulk::Compressor;
use zstd::zstd_safe::{CParameter, DCtx, DDict};

use super::{DICT, PackError, ZSTD, varint};

/// The longest value that a dictionary is made of: of longer ones few samples would do for all of it.
pub const SMALL: usize = 32 << 10;
/// The most bytes that a dictionary has: all readers of a store share one, in a core's cache next to what they unpack.
pub const SIZE_MAX: usize = 512 << 10;
/// So many that are useful are found in samples of any size.
const SIZE_MIN: usize = 112 << 10;
/// Bytes of samples for each of a dictionary.
pub const SAMPLED: usize = 28;
/// The zstd level of what stays: read as fast as any other, and made at some 5 MB/s. Lower ones make little of a large dictionary.
const LEVEL: i32 = 18;

/// What values can be packed with. Such a value names it, and is nothing without it.
pub struct Dictionary {
    id: u64,
    bytes: Vec<u8>,
    reader: DDict<'static>,
}

impl fmt::Debug for Dictionary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Dictionary({}, {} bytes)", self.id, self.bytes.len())
    }
}

impl Dictionary {
    /// The dictionary that these bytes are, under this id.
    pub fn new(id: u64, bytes: Vec<u8>) -> Dictionary {
        let reader = DDict::create(&bytes);
        Dictionary { id, bytes, reader }
    }

    /// Makes one of samples that lie in one row; `None` if they have nothing in common.
    pub fn train(id: u64, samples: &[u8], lengths: &[usize]) -> Option<Dictionary> {
        let size = (samples.len() / SAMPLED).clamp(SIZE_MIN, SIZE_MAX);
        let bytes = zstd::dict::from_continuous(samples, lengths, size).ok()?;
        Some(Dictionary::new(id, bytes))
    }

    pub fn id(&self) -> u64 {
        self.id
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Returns the raw bytes, at most `len`, of a payload.
    pub(super) fn decompress(&self, payload: &[u8], len: usize) -> Result<Vec<u8>, PackError> {
        thread_local! {
            static CONTEXT: RefCell<DCtx<'static>> = RefCell::new(DCtx::create());
        }
        let mut raw = Vec::with_capacity(len);
        CONTEXT
            .with_borrow_mut(|context| {
                context.decompress_using_ddict(&mut raw, payload, &self.reader)
            })
            .map_err(|_| PackError::Payload)?;
        Ok(raw)
    }
}

/// Packs values that stay.
pub struct Packer {
    compressor: Compressor<'static>,
    /// The id of its dictionary.
    dictionary: Option<u64>,
}

impl Packer {
    /// A packer with a dictionary, or without.
    ///
    /// # Errors
    /// zstd has no memory.
    pub fn new(dictionary: Option<&Dictionary>) -> std::io::Result<Packer> {
        let bytes = dictionary.map_or(&[][..], |dictionary| &dictionary.bytes);
        let mut compressor = Compressor::with_dictionary(LEVEL, bytes)?;
        // The value names it before the payload.
        compressor.set_parameter(CParameter::DictIdFlag(false))?;
        Ok(Packer {
            compressor,
            dictionary: dictionary.map(Dictionary::id),
        })
    }

    /// Returns a stored form of `raw` that is shorter than `most`, if there is one.
    pub fn pack(&mut self, raw: &[u8], most: usize) -> Option<Vec<u8>> {
        let mut out = vec![if self.dictionary.is_some() {
            DICT
        } else {
            ZSTD
        }];
        varint::put(&mut out, raw.len() as u64);
        if let Some(id) = self.dictionary {
            varint::put(&mut out, id);
        }
        out.extend(self.compressor.compress(raw).ok()?);
        (out.len() < most).then_some(out)
    }
}

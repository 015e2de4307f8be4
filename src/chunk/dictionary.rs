//! Dictionaries: what many small values have in common, so that each is stored without it. And the careful compression of values that
//! stay, with a dictionary or without.

use std::cell::RefCell;
use std::fmt;

use zstd::bulk::Compressor;
use zstd::zstd_safe::{CParameter, DCtx, DDict};

use super::{DICT, PackError, ZSTD, varint};

/// The longest value that is packed with a dictionary: longer ones have enough in common with themselves.
pub const SMALL: usize = 32 << 10;
/// The most bytes that a dictionary has.
pub const SIZE_MAX: usize = 112 << 10;
/// The zstd level of what stays: read as fast as any other, and made at some 3 MB/s.
const LEVEL: i32 = 15;

/// What small values can be packed with. Such a value names it, and is nothing without it.
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
        let bytes = zstd::dict::from_continuous(samples, lengths, SIZE_MAX).ok()?;
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
    plain: Compressor<'static>,
    /// With the id of its dictionary.
    small: Option<(u64, Compressor<'static>)>,
}

impl Packer {
    /// A packer that uses `dictionary` for small values.
    ///
    /// # Errors
    /// zstd has no memory.
    pub fn new(dictionary: Option<&Dictionary>) -> std::io::Result<Packer> {
        let with = |dictionary: &Dictionary| {
            let mut small = Compressor::with_dictionary(LEVEL, &dictionary.bytes)?;
            // The value names it before the payload.
            small.set_parameter(CParameter::DictIdFlag(false))?;
            Ok::<_, std::io::Error>((dictionary.id, small))
        };
        Ok(Packer {
            plain: Compressor::new(LEVEL)?,
            small: dictionary.map(with).transpose()?,
        })
    }

    /// Returns a stored form of `raw` that is shorter than `most`, if there is one.
    pub fn pack(&mut self, raw: &[u8], most: usize) -> Option<Vec<u8>> {
        let small = self.small.as_mut().filter(|_| raw.len() <= SMALL);
        let (head, packed) = match small {
            Some((id, small)) => {
                let mut head = vec![DICT];
                varint::put(&mut head, raw.len() as u64);
                varint::put(&mut head, *id);
                (head, small.compress(raw).ok()?)
            }
            None => {
                let mut head = vec![ZSTD];
                varint::put(&mut head, raw.len() as u64);
                (head, self.plain.compress(raw).ok()?)
            }
        };
        (head.len() + packed.len() < most).then(|| [head, packed].concat())
    }
}

//! Settling: chunks that stay are compressed once more, slowly and well, under the ids that they have.
//!
//! It goes through the index of chunks in rounds, a day from the end of one to the beginning of the next. What a round finds fresh
//! it only marks; what it finds marked has been there for a day and is settled. The mark stands in the index, so nothing is read
//! twice, and where a round has come to is but a hint. All writes go without WAL: what is lost of them was as good before.

use std::sync::Arc;

use rocksdb::{DB, WriteBatch, WriteOptions};
use serde::{Deserialize, Serialize};

use super::meta::json;
use super::{Step, Store, StoreError, Target, family, keys, open, prefix_of, stored_len};
use crate::chunk::{self, ChunkId, Dictionary, Packer, Place, varint};

/// From the end of a round to the beginning of the next: nanoseconds.
const DAY: i64 = 86_400 * 1_000_000_000;
/// Chunks between two notes of where a round is.
const PAGE: usize = 256;
/// So many small chunks are worth a dictionary.
const ENOUGH: u64 = 1000;
/// Raw bytes of the samples of the largest one, and of what it is judged by.
const SAMPLES: u64 = (chunk::DICTIONARY_MAX * chunk::SAMPLED) as u64 * 4 / 3;
/// Dictionaries are kept as long as the store, so there are not many.
const DICTIONARIES: u64 = 16;

/// What the index says of a chunk beside its sizes; nothing of one that is fresh.
const SEEN: u8 = 1;
const SETTLED: u8 = 2;
/// It lies in a kept spool, where that follows: nothing makes it smaller.
const KEPT: u8 = 3;

/// What settling did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Settled {
    /// Chunks that are as small now as they get.
    pub settled_chunks: u64,
    /// Stored bytes that they take less.
    pub saved_bytes: u64,
    /// The round came to its end.
    #[serde(skip)]
    pub whole: bool,
}

/// The rounds, as the family `meta` has them.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub(super) struct Rounds {
    /// The last chunk that this round has come to; None between two rounds.
    at: Option<ChunkId>,
    /// When the last one ended, in nanoseconds since 1970.
    ended: i64,
    /// Stored bytes that were saved since the store was made.
    pub saved: u64,
    /// Stored bytes that have been replaced and still take room on the disk.
    pub replaced: u64,
}

/// Which chunks are to be settled.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ripe {
    Seen,
    All,
}

impl Ripe {
    fn is(self, sizes: &[u8]) -> bool {
        match state(sizes) {
            Some(SEEN) => true,
            Some(_) => false,
            None => self == Ripe::All,
        }
    }
}

/// What the index says of a chunk beside its sizes.
fn state(sizes: &[u8]) -> Option<u8> {
    let mut rest = sizes;
    varint::take(&mut rest)?;
    varint::take(&mut rest)?;
    rest.first().copied()
}

/// Whether the index says of a chunk that it is as small as it gets.
pub(super) fn is_settled(sizes: &[u8]) -> bool {
    state(sizes) == Some(SETTLED)
}

/// What the index says of a chunk in a kept spool.
pub(super) fn kept_sizes(place: Place) -> Vec<u8> {
    let mut out = sizes(place.len, place.len, KEPT);
    place.put(&mut out);
    out
}

/// Where the index says that a chunk lies, if that is a kept spool.
pub(super) fn place(sizes: &[u8]) -> Option<Place> {
    let mut rest = sizes;
    let len = varint::take(&mut rest)?;
    varint::take(&mut rest)?;
    Place::take(rest.strip_prefix(&[KEPT])?, len)
}

fn sizes(raw: u64, stored: u64, state: u8) -> Vec<u8> {
    let mut out = Vec::with_capacity(9);
    varint::put(&mut out, raw);
    varint::put(&mut out, stored);
    out.push(state);
    out
}

impl Store {
    /// Goes on with the round, or begins one if that is due, as long as `go_on` says so, which is asked before each chunk.
    ///
    /// # Errors
    /// What the disk answered. Damage is no error: it is left as it is.
    pub fn settle(&self, now: i64, go_on: &dyn Fn() -> bool) -> Result<Settled, StoreError> {
        let rounds = self.rounds()?;
        let is_new = rounds == Rounds::default();
        if is_new {
            // Everything in it is fresh, and many stores do not live for a day.
            self.update_rounds(|rounds| rounds.ended = now)?;
        }
        let rests = (rounds.ended..rounds.ended.saturating_add(DAY)).contains(&now);
        match rounds.at {
            None if is_new || rests => Ok(Settled {
                whole: true,
                ..Settled::default()
            }),
            at => self.settle_from(at, Ripe::Seen, now, go_on),
        }
    }

    /// Settles everything, whatever its age.
    ///
    /// # Errors
    /// As [`Store::settle`].
    pub fn settle_all(&self, now: i64, go_on: &dyn Fn() -> bool) -> Result<Settled, StoreError> {
        self.settle_from(None, Ripe::All, now, go_on)
    }

    fn settle_from(
        &self,
        at: Option<ChunkId>,
        ripe: Ripe,
        now: i64,
        go_on: &dyn Fn() -> bool,
    ) -> Result<Settled, StoreError> {
        let dictionary = match at {
            None => self.choose_dictionary(ripe)?,
            Some(_) => self.newest_dictionary()?,
        };
        let no_memory = |source| StoreError::Io {
            what: "compression".into(),
            source,
        };
        let mut packer = Packer::new(dictionary.as_deref()).map_err(no_memory)?;
        let mut done = Settled::default();
        let mut from = at.map_or_else(Vec::new, behind);
        loop {
            let page = self.keys(Target::Sizes, &from, PAGE)?;
            if page.is_empty() {
                break;
            }
            let before = done;
            let (mut replaced, mut at, mut goes_on) = (0, None, true);
            for (id, was) in page {
                goes_on = go_on();
                if !goes_on {
                    break;
                }
                let id = ChunkId(id);
                if ripe.is(&was) {
                    replaced += self.settle_chunk(id, &was, &mut packer, &mut done)?;
                } else if state(&was).is_none()
                    && let Some((raw, stored)) = stored_len(&was)
                {
                    self.replace(id, &was, &sizes(raw, stored, SEEN), None)?;
                }
                at = Some(id);
            }
            if let Some(at) = at {
                from = behind(at);
                self.update_rounds(|rounds| {
                    rounds.at = Some(at);
                    rounds.saved += done.saved_bytes - before.saved_bytes;
                    rounds.replaced += replaced;
                })?;
            }
            if !goes_on {
                return Ok(done);
            }
        }
        if done.settled_chunks > 0 {
            self.flush()?;
        }
        if self.has_much_replaced() && self.room() > self.disk_bytes() {
            self.compact()?;
        }
        self.update_rounds(|rounds| {
            rounds.at = None;
            rounds.ended = now;
        })?;
        done.whole = true;
        Ok(done)
    }

    /// Compresses one chunk anew; returns how many stored bytes were replaced.
    fn settle_chunk(
        &self,
        id: ChunkId,
        was: &[u8],
        packer: &mut Packer,
        done: &mut Settled,
    ) -> Result<u64, StoreError> {
        let Some((_, before)) = stored_len(was) else {
            return Ok(0);
        };
        let raw = match self.load_chunk(id) {
            Ok(raw) => raw,
            // It stays as it is, for whoever checks.
            Err(StoreError::Missing { .. } | StoreError::Corrupt { .. }) => return Ok(0),
            Err(error) => return Err(error),
        };
        // Less is not worth a write.
        let most = before - before / 64;
        let stored = packer.pack(&raw, most as usize);
        let after = stored.as_ref().map_or(before, |s| s.len() as u64);
        self.reach(Step::Repacked)?;
        let sizes = sizes(raw.len() as u64, after, SETTLED);
        if !self.replace(id, was, &sizes, stored.as_deref())? {
            return Ok(0);
        }
        done.settled_chunks += 1;
        done.saved_bytes += before - after;
        Ok(if stored.is_some() { before } else { 0 })
    }

    /// Changes what the index says of a chunk, and with it the stored value if there is another, unless gc or an ingest was there
    /// since. Looked at and written under the lock that gc deletes under: what it deleted does not come back.
    fn replace(
        &self,
        id: ChunkId,
        was: &[u8],
        sizes: &[u8],
        stored: Option<&[u8]>,
    ) -> Result<bool, StoreError> {
        // A publish puts entries under the first of these locks alone.
        crate::sys::at_normal_priority(|| {
            let _serial = self.changing(&self.publishing)?;
            let _shard = self.hands.lock(prefix_of(&id.0));
            let same = self.with(|db| {
                let now = db.get_pinned_cf(family(db, Target::Sizes)?, id.0)?;
                Ok(now.is_some_and(|now| *now == *was))
            })?;
            if !same {
                return Ok(false);
            }
            let mut batch = WriteBatch::default();
            self.put(&mut batch, Target::Sizes, &id.0, sizes)?;
            if let Some(stored) = stored {
                self.put(&mut batch, Target::Chunks, &id.0, stored)?;
            }
            let mut options = WriteOptions::default();
            options.disable_wal(true);
            self.write(batch, &options)?;
            Ok(true)
        })
    }

    pub(super) fn rounds(&self) -> Result<Rounds, StoreError> {
        Ok(self.record(keys::ROUNDS)?.unwrap_or_default())
    }

    fn update_rounds(&self, change: impl FnOnce(&mut Rounds)) -> Result<(), StoreError> {
        let _serial = self.settling.lock();
        let before = self.rounds()?;
        let mut rounds = before.clone();
        change(&mut rounds);
        if rounds == before {
            return Ok(());
        }
        let mut batch = WriteBatch::default();
        self.put(&mut batch, Target::Meta, keys::ROUNDS, &json(&rounds))?;
        self.write_unsynced(batch)
    }

    /// Whether so much was replaced that the room it takes is worth a compaction.
    pub(super) fn has_much_replaced(&self) -> bool {
        let replaced = self.rounds().map_or(0, |rounds| rounds.replaced);
        replaced > 0 && replaced >= self.blob_bytes() / 8
    }

    /// A compaction gave the room of what was replaced back.
    pub(super) fn nothing_is_replaced(&self) -> Result<(), StoreError> {
        self.update_rounds(|rounds| rounds.replaced = 0)
    }
}

fn behind(id: ChunkId) -> Vec<u8> {
    [&id.0[..], &[0]].concat()
}

impl Store {
    /// Returns a dictionary; None if it is missing or damaged.
    pub(super) fn dictionary(
        &self,
        db: &DB,
        id: u64,
    ) -> Result<Option<Arc<Dictionary>>, StoreError> {
        if let Some(known) = self.dictionaries.lock().get(&id) {
            return Ok(Some(known.clone()));
        }
        let key = keys::one(keys::DICTIONARY, id);
        let Some(stored) = db.get_pinned_cf(family(db, Target::Meta)?, key)? else {
            return Ok(None);
        };
        let Ok(bytes) = chunk::unpack(&stored, chunk::DICTIONARY_MAX) else {
            return Ok(None);
        };
        let found = Arc::new(Dictionary::new(id, bytes));
        self.dictionaries.lock().insert(id, found.clone());
        Ok(Some(found))
    }

    fn newest_dictionary(&self) -> Result<Option<Arc<Dictionary>>, StoreError> {
        for id in (1..=DICTIONARIES).rev() {
            if let Some(found) = self.with(|db| self.dictionary(db, id))? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// The dictionary of a new round: a new one, if there are many small chunks to be settled and it makes them a twentieth smaller
    /// than the newest does, or none.
    fn choose_dictionary(&self, ripe: Ripe) -> Result<Option<Arc<Dictionary>>, StoreError> {
        let newest = self.newest_dictionary()?;
        let mut id = 1;
        while self.meta(&keys::one(keys::DICTIONARY, id))?.is_some() {
            id += 1;
        }
        if id > DICTIONARIES {
            return Ok(newest);
        }
        // Ids are hashes, so the first ones are as good as any.
        let (mut small, mut bytes, mut chosen) = (0, 0, Vec::new());
        let mut from = Vec::new();
        loop {
            let page = self.keys(Target::Sizes, &from, 10_000)?;
            let Some((last, _)) = page.last() else { break };
            from = behind(ChunkId(*last));
            for (id, sizes) in page.iter().filter(|(_, sizes)| ripe.is(sizes)) {
                let raw = stored_len(sizes).map_or(0, |(raw, _)| raw);
                if raw == 0 || raw > chunk::SMALL as u64 {
                    continue;
                }
                small += 1;
                if bytes + raw <= SAMPLES {
                    bytes += raw;
                    chosen.push(ChunkId(*id));
                }
            }
        }
        if small < ENOUGH {
            return Ok(newest);
        }
        let (mut samples, mut lengths, mut others) = (Vec::new(), Vec::new(), Vec::new());
        for (n, id) in chosen.into_iter().enumerate() {
            match self.load_chunk(id) {
                // A dictionary is judged by what it has not seen.
                Ok(raw) if n % 4 == 3 => others.push(raw),
                Ok(raw) => {
                    samples.extend_from_slice(&raw);
                    lengths.push(raw.len());
                }
                Err(StoreError::Missing { .. } | StoreError::Corrupt { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let Some(new) = Dictionary::train(id, &samples, &lengths) else {
            return Ok(newest);
        };
        let packed = |dictionary: Option<&Dictionary>| {
            let mut packer = Packer::new(dictionary).ok()?;
            let len = |raw: &Vec<u8>| packer.pack(raw, raw.len()).map_or(raw.len(), |p| p.len());
            Some(others.iter().map(len).sum::<usize>())
        };
        match (packed(Some(&new)), packed(newest.as_deref())) {
            (Some(with), Some(without)) if with < without - without / 20 => {
                self.put_dictionary(new).map(Some)
            }
            _ => Ok(newest),
        }
    }

    /// Keeps a dictionary for good: on the disk, with the format that has them, before any chunk names it.
    fn put_dictionary(&self, new: Dictionary) -> Result<Arc<Dictionary>, StoreError> {
        let key = keys::one(keys::DICTIONARY, new.id());
        let _serial = self.changing(&self.publishing)?;
        let mut batch = WriteBatch::default();
        let meta = Target::Meta;
        self.put(&mut batch, meta, &key, &chunk::pack(new.bytes(), 19))?;
        let format = self.raise_format(&mut batch, open::LARGE_DICTIONARIES)?;
        self.write_synced(batch)?;
        self.say_format(format)?;
        let new = Arc::new(new);
        self.dictionaries.lock().insert(new.id(), new.clone());
        Ok(new)
    }
}

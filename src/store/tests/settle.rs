//! What is compressed once more stays what it was, whatever happens beside it.

use std::cell::Cell;
use std::time::Duration;

use super::*;

const DAY: i64 = 86_400 * 1_000_000_000;

type Chunk = (ChunkId, Vec<u8>);

/// A small text that has much in common with the others.
fn text(n: u64) -> Vec<u8> {
    let mut out = format!("{{\"name\": \"package-{n}\", \"version\": \"{}.0\",", n % 7);
    for byte in &noise(n)[..40] {
        let word = ["dependencies", "homepage", "license", "repository"][usize::from(byte % 4)];
        out.push_str(&format!(
            " \"{word}-{byte}\": \"https://example.org/{word}\","
        ));
    }
    out.into_bytes()
}

/// A store with chunks that nothing holds in hand any more.
fn furnished(dir: &Path, small: u64) -> (Arc<Store>, Vec<Chunk>) {
    let store = open(dir).unwrap();
    let mut contents: Vec<Vec<u8>> = (0..small).map(text).collect();
    contents.extend((0..3).map(|n| text(n).repeat(60)));
    contents.push(noise(1));
    contents.push(Vec::new());
    let ingest = Arc::new(store.ingest());
    let chunks = contents
        .into_iter()
        .map(|bytes| (ingest.chunk(&bytes).unwrap(), bytes));
    let chunks = chunks.collect();
    store
        .publish(std::slice::from_ref(&ingest), Publish::default())
        .unwrap();
    drop(ingest);
    (store, chunks)
}

fn assert_whole(store: &Store, chunks: &[Chunk]) {
    for (id, bytes) in chunks {
        assert!(store.load_chunk(*id).unwrap() == *bytes, "chunk {id}");
    }
}

fn all(store: &Store) -> Settled {
    let settled = store.settle_all(1, &|| true).unwrap();
    assert!(settled.whole);
    settled
}

fn stored(store: &Store, target: Target, key: &[u8]) -> Option<Vec<u8>> {
    let found = store.with(|db| Ok(db.get_cf(family(db, target)?, key)?));
    found.unwrap()
}

#[test]
fn what_is_settled_keeps_its_ids_and_bytes_and_takes_less() {
    let dir = tempfile::tempdir().unwrap();
    let (store, chunks) = furnished(dir.path(), 1200);
    let before = store.stats().unwrap();
    let settled = all(&store);
    let after = store.stats().unwrap();
    assert_eq!(settled.settled_chunks, before.chunks);
    assert_eq!(after.settled_chunks, before.chunks);
    assert_eq!(after.unique_bytes, before.unique_bytes);
    assert_eq!(
        (after.stored_bytes, after.saved_bytes),
        (
            before.stored_bytes - settled.saved_bytes,
            settled.saved_bytes
        )
    );
    assert!(
        settled.saved_bytes > before.stored_bytes / 5,
        "{settled:?} of {before:?}"
    );
    assert_whole(&store, &chunks);
    drop(store);
    let store = open(dir.path()).unwrap();
    assert_whole(&store, &chunks);
    assert_eq!(all(&store).settled_chunks, 0, "all is settled");
    assert_eq!(store.stats().unwrap().saved_bytes, settled.saved_bytes);
}

#[test]
fn the_room_of_what_was_replaced_is_given_back() {
    let dir = tempfile::tempdir().unwrap();
    let (store, chunks) = furnished(dir.path(), 5000);
    store.flush().unwrap();
    let before = store.blob_bytes();
    let saved = all(&store).saved_bytes;
    let after = store.blob_bytes();
    assert!(after < before - saved / 2, "{before} - {saved}: {after}");
    assert_eq!(store.rounds().unwrap().replaced, 0);
    assert_whole(&store, &chunks);
}

#[test]
fn only_a_store_with_a_dictionary_is_of_the_format_that_has_them() {
    for (small, format) in [(900, 1), (1200, 4)] {
        let dir = tempfile::tempdir().unwrap();
        let (store, chunks) = furnished(dir.path(), small);
        all(&store);
        let kept = stored(&store, Target::Meta, &keys::one(keys::DICTIONARY, 1));
        assert_eq!(kept.is_some(), format == 4);
        let said = stored(&store, Target::Meta, keys::FORMAT).unwrap();
        assert_eq!(said, u32::to_be_bytes(format));
        let state = dir.path().join("state");
        let line = format!("format {format}\n");
        assert_eq!(std::fs::read_to_string(&state).unwrap(), line);
        drop(store);
        // The process ended before it came to that line.
        std::fs::write(&state, "format 1\n").unwrap();
        let store = open(dir.path()).unwrap();
        assert_eq!(std::fs::read_to_string(&state).unwrap(), line);
        assert_whole(&store, &chunks);
    }
}

#[test]
fn a_new_dictionary_is_kept_only_for_what_the_old_one_does_not_know() {
    let dir = tempfile::tempdir().unwrap();
    let (store, chunks) = furnished(dir.path(), 1200);
    all(&store);
    let second = || stored(&store, Target::Meta, &keys::one(keys::DICTIONARY, 2));
    let add = |content: &dyn Fn(u64) -> Vec<u8>| -> Vec<Chunk> {
        let ingest = Arc::new(store.ingest());
        let contents = (2000..3200).map(content);
        let chunks = contents.map(|bytes| (ingest.chunk(&bytes).unwrap(), bytes));
        let chunks = chunks.collect();
        store.publish(&[ingest], Publish::default()).unwrap();
        chunks
    };
    let alike = add(&text);
    all(&store);
    assert!(second().is_none());
    let other = add(&|n| {
        let piece = |byte: &u8| format!("<td class=\"cell column-{byte}\"><p>{byte}</p></td>\n");
        let pieces: String = noise(n)[..30].iter().map(piece).collect();
        pieces.into_bytes()
    });
    all(&store);
    assert!(second().is_some());
    for chunks in [chunks, alike, other] {
        assert_whole(&store, &chunks);
    }
}

#[test]
fn what_is_fresh_is_settled_when_it_has_been_there_for_a_day() {
    let dir = tempfile::tempdir().unwrap();
    let (store, chunks) = furnished(dir.path(), 20);
    let settle = |now: i64| store.settle(now, &|| true).unwrap().settled_chunks;
    let now = 1000 * DAY;
    assert_eq!(settle(now - DAY), 0, "the store is new");
    assert_eq!(settle(now), 0);
    let fresh = stored_chunk(&store, &text(500));
    assert_eq!(settle(now + DAY - 1), 0);
    assert_eq!(settle(now + DAY), chunks.len() as u64);
    let sizes = |id: ChunkId| stored(&store, Target::Sizes, &id.0).unwrap();
    assert!(!crate::store::settle::is_settled(&sizes(fresh)));
    assert_eq!(settle(now + 2 * DAY), 1);
    assert!(crate::store::settle::is_settled(&sizes(fresh)));
    // The clock was set back.
    stored_chunk(&store, &text(501));
    assert_eq!(settle(now), 0);
    assert_eq!(settle(now + DAY), 1);
    assert_whole(&store, &chunks);
}

#[test]
fn a_round_goes_on_where_it_was_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let (store, chunks) = furnished(dir.path(), 700);
    let now = 1000 * DAY;
    for before in [DAY, 0] {
        assert!(store.settle(now - before, &|| true).unwrap().whole);
    }
    let first = 300;
    let left = Cell::new(first + 1);
    let go_on = || {
        left.set(left.get() - 1);
        left.get() > 0
    };
    let settled = store.settle(now + DAY, &go_on).unwrap();
    assert_eq!((settled.settled_chunks, settled.whole), (first, false));
    drop(store);
    let store = open(dir.path()).unwrap();
    let asked = Cell::new(0);
    let go_on = || {
        asked.set(asked.get() + 1);
        true
    };
    let settled = store.settle(now + DAY, &go_on).unwrap();
    let rest = chunks.len() as u64 - first;
    assert_eq!((asked.get(), settled.settled_chunks), (rest, rest));
    assert_whole(&store, &chunks);
}

#[test]
fn what_is_damaged_is_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let (store, chunks) = furnished(dir.path(), 20);
    let id = chunks[3].0;
    store.damage_chunk(id);
    let all_of = || [Target::Chunks, Target::Sizes].map(|target| stored(&store, target, &id.0));
    let before = all_of();
    assert_eq!(all(&store).settled_chunks, chunks.len() as u64 - 1);
    assert_eq!(all_of(), before);
    assert!(matches!(
        store.load_chunk(id),
        Err(StoreError::Corrupt { .. })
    ));
}

#[test]
fn a_chunk_whose_dictionary_is_gone_is_damaged_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let (store, chunks) = furnished(dir.path(), 1200);
    all(&store);
    let mut batch = WriteBatch::default();
    let key = keys::one(keys::DICTIONARY, 1);
    store.delete(&mut batch, Target::Meta, &key).unwrap();
    store.write_synced(batch).unwrap();
    drop(store);
    let store = open(dir.path()).unwrap();
    let error = store.load_chunk(chunks[0].0).unwrap_err();
    assert!(matches!(error, StoreError::Corrupt { .. }));
    assert!(error.to_string().contains("dictionary 1"), "{error}");
}

#[test]
fn what_gc_deletes_while_it_is_settled_does_not_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let (store, chunks) = furnished(dir.path(), 20);
    let (collecting, once) = (store.clone(), std::sync::Once::new());
    store.steps.meanwhile(move |step| {
        if step == Step::Repacked {
            once.call_once(|| assert!(collecting.gc(false, no_roots).is_ok()));
        }
    });
    assert_eq!(
        all(&store),
        Settled {
            whole: true,
            ..Settled::default()
        }
    );
    store.steps.over();
    assert!(store.keys(Target::Sizes, &[], 10).unwrap().is_empty());
    assert!(stored(&store, Target::Chunks, &chunks[0].0.0).is_none());
}

/// Runs `beside` in another thread when settling comes to a step for the `nth` time; it may have to wait for a lock.
fn settle_with(
    store: &Arc<Store>,
    at: (Step, usize),
    beside: impl Fn(&Arc<Store>) + Send + Sync + 'static,
) {
    let running = Arc::new(Mutex::new(None));
    let (beside, count) = (Arc::new(beside), Mutex::new(0));
    let (other, started) = (Arc::downgrade(store), running.clone());
    store.steps.meanwhile(move |step| {
        let mut count = count.lock();
        *count += usize::from(step == at.0);
        if step != at.0 || *count != at.1 {
            return;
        }
        drop(count);
        let (other, beside) = (other.upgrade().unwrap(), beside.clone());
        let thread = std::thread::spawn(move || beside(&other));
        let until = Instant::now() + Duration::from_millis(200);
        while !thread.is_finished() && Instant::now() < until {
            std::thread::yield_now();
        }
        *started.lock() = Some(thread);
    });
    all(store);
    let thread = running.lock().take();
    thread.expect("the step was reached").join().unwrap();
    store.steps.over();
}

/// Something happens at every step of settling; then all of `wanted` is whole, and all else is gone.
fn at_every_step(beside: fn(&Arc<Store>, &[Chunk]), kept: fn(usize) -> bool) {
    let template = tempfile::tempdir().unwrap();
    let (store, chunks) = furnished(template.path(), 1010);
    let wanted: Vec<_> = (0..chunks.len())
        .filter(|n| kept(*n))
        .map(|n| chunks[n].clone())
        .collect();
    let entries = wanted.iter().enumerate();
    let entries = entries.map(|(n, (id, _))| content(n as u64 + 2, *id));
    version_of(&store, &entries.collect::<Vec<_>>());
    drop(store);
    let copy = || {
        let dir = tempfile::tempdir().unwrap();
        copy_folder(template.path(), dir.path());
        (open(dir.path()).unwrap(), dir)
    };
    let (store, _dir) = copy();
    store.steps.watch();
    all(&store);
    let reached = store.steps.seen();
    assert!(reached.contains_key(&Step::Repacked) && reached.contains_key(&Step::Synced));
    for (step, count) in reached {
        for nth in [1, count / 2, count] {
            println!("at {step:?}, {nth} of {count}");
            let (store, dir) = copy();
            let all_chunks = chunks.clone();
            settle_with(&store, (step, nth.max(1)), move |store| {
                beside(store, &all_chunks);
            });
            assert_whole(&store, &wanted);
            let left = dir.path().join("left");
            store.copy_as_it_lies(&left);
            for store in [store, open(&left).unwrap()] {
                store.gc(false, no_roots).unwrap();
                assert_whole(&store, &wanted);
                let sizes = store.keys(Target::Sizes, &[], 10_000).unwrap();
                assert_eq!(sizes.len(), wanted.len());
                for (id, _) in &chunks {
                    let chunk = stored(&store, Target::Chunks, &id.0);
                    let sizes = stored(&store, Target::Sizes, &id.0);
                    let said = sizes
                        .as_deref()
                        .and_then(stored_len)
                        .map(|(_, stored)| stored);
                    assert_eq!(said, chunk.map(|chunk| chunk.len() as u64), "chunk {id}");
                }
            }
        }
    }
}

#[test]
fn a_gc_at_every_step_of_settling_takes_garbage_and_nothing_else() {
    let gc = |store: &Arc<Store>, _: &[Chunk]| {
        store.gc(false, no_roots).unwrap();
    };
    at_every_step(gc, |n| n % 3 == 0);
}

#[test]
fn what_is_ingested_again_at_every_step_of_settling_stays() {
    let ingest = |store: &Arc<Store>, chunks: &[Chunk]| {
        store.gc(false, no_roots).unwrap();
        let ingest = Arc::new(store.ingest());
        for (_, bytes) in chunks.iter().step_by(3) {
            ingest.chunk(bytes).unwrap();
        }
        store.publish(&[ingest], Publish::default()).unwrap();
    };
    at_every_step(ingest, |n| n % 6 == 0);
}

#[test]
fn the_format_of_settled_chunks_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = furnished(dir.path(), 1200);
    let id = stored_chunk(&store, b"abc");
    for day in [0, 1] {
        store.settle(1 + day * DAY, &|| true).unwrap();
    }
    let sizes = || stored(&store, Target::Sizes, &id.0).unwrap();
    assert_format("the sizes of a chunk that was seen", &sizes(), "03 05 01");
    all(&store);
    assert_format("the sizes of a settled chunk", &sizes(), "03 05 02");
    let dictionary = stored(&store, Target::Meta, &hex("7a 0000000000000001")).unwrap();
    let bytes = chunk::unpack(&dictionary, chunk::DICTIONARY_MAX).unwrap();
    assert_format("what a dictionary begins with", &bytes[..4], "37a430ec");
    let rounds = stored(&store, Target::Meta, b"!rounds").unwrap();
    let rounds = String::from_utf8(rounds).unwrap();
    assert!(
        rounds.starts_with(r#"{"at":null,"ended":1,"saved":"#),
        "{rounds}"
    );
}

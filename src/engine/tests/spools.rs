//! Spools that are kept: what a job wrote in bulk, and nothing makes smaller, is not copied.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

use super::content::ingest_ahead;
use super::faults::{kill, no_strays};
use super::*;

const LARGE: usize = 1 << 20;

/// Noise from its first byte on.
fn dense(len: usize, seed: u64) -> Vec<u8> {
    noise(len, seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

fn kept(bench: &Bench) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(bench.path().join("spools")) else {
        return Vec::new();
    };
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// Waits until kept spools take as much of the disk as they should.
fn takes(bench: &Bench, wanted: std::ops::Range<u64>) {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        let taken = |path: &PathBuf| fs::metadata(path).unwrap().blocks() * 512;
        let taken: u64 = kept(bench).iter().map(taken).sum();
        if wanted.contains(&taken) {
            return;
        }
        assert!(Instant::now() < until, "{taken} of {wanted:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn shows(bench: &Bench, files: &[(&str, &[u8])]) {
    let id = bench.fork("v");
    for (name, bytes) in files {
        assert!(
            get(&bench.fs(id), name).as_deref() == Some(*bytes),
            "{name}"
        );
    }
    bench.engine().abandon(id).unwrap();
}

/// What so many bytes take there, but for the pieces between two rooms of the spool, which are copied.
fn about(bytes: usize) -> std::ops::Range<u64> {
    bytes as u64 * 3 / 4..bytes as u64 * 9 / 8
}

fn ahead(bench: &Bench, id: ForkId) -> u64 {
    let live = bench.engine().live(id).unwrap();
    // What was written within the last second is left alone.
    std::thread::sleep(Duration::from_secs(2));
    ingest_ahead(bench, id);
    let ahead = live.ahead.lock();
    ahead.as_ref().unwrap().new_bytes()
}

/// > What compression cannot make smaller is not written twice: where it is at least half of what a job wrote, and 8 MiB or more, it
/// > stays where the job wrote it.
#[test]
fn what_nothing_makes_smaller_stays_where_the_job_wrote_it_and_the_rest_goes() {
    let mut bench = Bench::new();
    let id = bench.fork("v");
    let (dense, text, small) = (dense(LARGE, 1), codes(LARGE / 2, 2), dense(5_000, 3));
    let files = [("small", &*small), ("text", &*text), ("dense", &*dense)];
    for (name, bytes) in files {
        put(&bench.fs(id), name, bytes);
    }
    let done = bench.engine().commit(vec![id], request(false)).unwrap();
    let new = done[0].version.as_ref().unwrap().new_bytes;
    assert!(new > LARGE as u64, "{new}");
    assert_eq!(kept(&bench).len(), 1);
    takes(&bench, about(LARGE));
    shows(&bench, &files);
    bench.engine().gc(false).unwrap();
    takes(&bench, about(LARGE));
    kill(&mut bench);
    shows(&bench, &files);
    no_strays(&bench);
    check(&bench);
}

#[test]
fn where_it_is_little_or_the_lesser_part_or_the_fork_goes_on_it_is_copied() {
    let mut bench = Bench::new();
    bench.bulk = LARGE as u64;
    bench.reopen();
    let little = bench.fork("little");
    put(&bench.fs(little), "dense", &dense(LARGE - 1, 1));
    bench.commit(little, false);
    assert!(kept(&bench).is_empty());
    bench.bulk = LITTLE;
    bench.reopen();
    let text = bench.fork("text");
    put(&bench.fs(text), "text", &codes(2 * LARGE, 2));
    put(&bench.fs(text), "dense", &dense(LARGE / 2, 3));
    bench.commit(text, false);
    assert!(kept(&bench).is_empty());
    let goes_on = bench.fork("v");
    let first = dense(LARGE, 4);
    let ino = put(&bench.fs(goes_on), "dense", &first);
    bench.commit(goes_on, true);
    assert!(kept(&bench).is_empty());
    bench
        .fs(goes_on)
        .write(ME, ino, 0, b"other", false)
        .unwrap();
    shows(&bench, &[("dense", &first)]);
    bench.commit(goes_on, false);
    check(&bench);
}

#[test]
fn what_was_hashed_ahead_is_in_the_version_as_the_commit_finds_it() {
    for (keep, drowned) in [(false, false), (true, false), (false, true)] {
        println!("keep {keep}, drowned {drowned}");
        let bench = Bench::new();
        let id = bench.fork("v");
        let fs = bench.fs(id);
        let (mut changed, same) = (dense(LARGE, 1), dense(LARGE, 2));
        let ino = put(&fs, "changed", &changed);
        put(&fs, "same", &same);
        let twin = put(&fs, "twin", b"");
        let copied = ahead(&bench, id);
        assert!(copied < LARGE as u64 / 2, "{copied}");
        fs.write(ME, ino, 500_000, b"other", false).unwrap();
        changed[500_000..500_005].copy_from_slice(b"other");
        // The same bytes in a file where they lie in pieces.
        for (n, part) in same.chunks(50_000).enumerate().rev() {
            fs.write(ME, twin, n as u64 * 50_000, part, false).unwrap();
        }
        let text = codes(6 * LARGE, 3);
        if drowned {
            put(&fs, "text", &text);
        }
        drop(fs);
        bench.commit(id, keep);
        assert_eq!(kept(&bench).is_empty(), keep || drowned);
        shows(
            &bench,
            &[("changed", &changed), ("same", &same), ("twin", &same)],
        );
        if keep {
            bench.commit(id, false);
        }
        check(&bench);
    }
}

#[test]
fn what_goes_from_a_kept_spool_frees_the_disk_with_the_next_gc_and_in_the_end_so_does_the_spool() {
    let bench = Bench::new();
    let id = bench.fork("first");
    let (stays, goes) = (dense(LARGE, 1), dense(LARGE, 2));
    put(&bench.fs(id), "goes", &goes);
    put(&bench.fs(id), "stays", &stays);
    bench.commit(id, false);
    takes(&bench, about(2 * LARGE));
    let id = bench.fork_with("v", |request| request.from = Some("first@1".into()));
    bench.fs(id).unlink(ME, ROOT, b"goes").unwrap();
    bench.commit(id, false);
    bench.engine().remove_volume("first", false).unwrap();
    let before = bench.engine().store.disk_bytes();
    let freed = bench.engine().gc(false).unwrap().garbage.freed_bytes;
    takes(&bench, about(LARGE));
    assert!(freed > LARGE as u64 / 2 && freed <= before, "{freed}");
    shows(&bench, &[("stays", &stays)]);
    check(&bench);
    bench.engine().remove_volume("v", false).unwrap();
    bench.engine().gc(false).unwrap();
    assert!(kept(&bench).is_empty());
}

#[test]
fn what_comes_again_when_it_was_removed_is_not_looked_for_in_the_old_spool() {
    let bench = Bench::new();
    for round in 0..3 {
        let id = bench.fork("v");
        put(&bench.fs(id), "f", &dense(LARGE, 1));
        put(&bench.fs(id), "other", &dense(LARGE, 10 + round));
        bench.commit(id, false);
        shows(&bench, &[("f", &dense(LARGE, 1))]);
        check(&bench);
        bench.engine().remove_volume("v", false).unwrap();
        if round > 0 {
            bench.engine().gc(false).unwrap();
        }
    }
}

#[test]
fn a_gc_takes_nothing_of_a_spool_that_somebody_may_still_read_as_the_forks() {
    let bench = Bench::new();
    let store = &bench.engine().store;
    let fork = store::ForkId(7);
    let spool = bench.dir.path().join("spool");
    let bytes = dense(LARGE, 1);
    fs::write(&spool, [&*bytes, &*dense(50_000, 2)].concat()).unwrap();
    let ingest = Arc::new(store.ingest());
    let place = crate::chunk::Place {
        spool: 7,
        offset: 0,
        len: 100_000,
    };
    let id = crate::chunk::ChunkId::of(&bytes[..100_000]);
    ingest.lies(id, place).unwrap();
    store.keep_spool(fork, &spool).unwrap();
    ingest.keep(true);
    store.publish(&[ingest], store::Publish::default()).unwrap();
    assert_eq!(**store.chunk(id).unwrap(), bytes[..100_000]);
    let before = fs::read(&spool).unwrap();
    bench.engine().gc(false).unwrap();
    assert!(fs::read(&spool).unwrap() == before);
    // Nor if the fork lives on, as after a commit that was in doubt, in another daemon.
    bench.fork("v");
    let mut record = store.forks().unwrap().remove(0);
    record.id = fork;
    store.put_fork(&record).unwrap();
    let parts = store.end_spool(fork).unwrap();
    bench.engine().gc(false).unwrap();
    assert!(fs::read(&spool).unwrap() == before);
    store.remove_fork(fork).unwrap();
    parts.give_back().unwrap();
    let after = fs::read(&spool).unwrap();
    assert!(after[..100_000] == before[..100_000]);
    assert!(after[110_000..].iter().all(|byte| *byte == 0));
    // Nothing names the chunk.
    bench.engine().gc(false).unwrap();
    assert!(kept(&bench).is_empty() && store.stray_spools().is_empty());
}

/// Lets a commit fail when it may have been done: what it would have kept is what a version may have.
fn fail(bench: &Bench, id: ForkId) -> fs::File {
    bench.engine().store.steps.fill(true);
    bench.engine().commit(vec![id], request(false)).unwrap_err();
    bench.engine().store.steps.fill(false);
    fs::File::open(&kept(bench)[0]).unwrap()
}

/// The pieces of a file that a commit keeps, and where they lie in the spool.
fn pieces(fs: &Fs, ino: Ino, bytes: &[u8]) -> Vec<(u64, Vec<u8>)> {
    let layers = fs.fork.layers();
    let inode = layers.live.inodes[&ino].state.read();
    let (mut at, mut out) = (0, Vec::new());
    while at < bytes.len() {
        let len = crate::chunk::first_cut(&bytes[at..], true).unwrap();
        let piece = &bytes[at..at + len];
        let place = inode.content.in_spool(at as u64, (at + len) as u64);
        let place = place.filter(|_| crate::chunk::is_dense(piece));
        out.extend(place.map(|place| (place, piece.to_vec())));
        at += len;
    }
    assert!(out.len() > 5);
    out
}

fn has(file: &fs::File, pieces: &[(u64, Vec<u8>)]) -> bool {
    pieces.iter().all(|(place, piece)| {
        let mut bytes = vec![0; piece.len()];
        file.read_exact_at(&mut bytes, *place).unwrap();
        bytes == *piece
    })
}

#[test]
fn after_a_commit_that_failed_nothing_is_written_over_what_it_would_have_kept() {
    for again in [false, true] {
        let mut bench = Bench::new();
        let id = bench.fork("v");
        let first = dense(LARGE, 1);
        let ino = put(&bench.fs(id), "f", &first);
        let mut changed = dense(LARGE, 3);
        let other = put(&bench.fs(id), "changed", &changed);
        let mut first = pieces(&bench.fs(id), ino, &first);
        first.extend(pieces(&bench.fs(id), other, &changed));
        let kept_file = fail(&bench, id);
        assert!(has(&kept_file, &first));
        if again {
            // By another daemon.
            bench.reopen();
        }
        let fs = bench.fs(id);
        fs.unlink(ME, ROOT, b"f").unwrap();
        if !again {
            fs.forget(ino, 1);
        }
        fs.write(ME, other, 300_000, b"other", false).unwrap();
        changed[300_000..300_005].copy_from_slice(b"other");
        let new = dense(2 * LARGE, 2);
        put(&fs, "f", &new);
        assert!(has(&kept_file, &first), "again {again}");
        drop(fs);
        assert_eq!(bench.commit(id, false), Some(1));
        shows(&bench, &[("f", &new), ("changed", &changed)]);
        bench.engine().gc(false).unwrap();
        shows(&bench, &[("f", &new), ("changed", &changed)]);
        kill(&mut bench);
        no_strays(&bench);
        check(&bench);
    }
}

#[test]
fn what_a_commit_keeps_that_is_never_tried_is_the_forks_alone_again() {
    let bench = Bench::new();
    let id = bench.fork("v");
    let ino = put(&bench.fs(id), "f", &dense(LARGE, 1));
    let live = bench.engine().live(id).unwrap();
    let done = crate::commit::prepare(live.fork().unwrap(), false, 1).unwrap();
    assert!(kept(&bench).len() == 1 && bench.fs(id).fork.spool.is_kept());
    done.thaw();
    assert!(kept(&bench).is_empty() && !bench.fs(id).fork.spool.is_kept());
    bench.fs(id).write(ME, ino, 0, b"other", false).unwrap();
    assert_eq!(bench.commit(id, false), Some(1));
    let expected = [b"other", &dense(LARGE, 1)[5..]].concat();
    shows(&bench, &[("f", &expected)]);
}

#[test]
fn a_gc_behind_a_commit_that_failed_takes_nothing_of_its_fork() {
    let bench = Bench::new();
    let id = bench.fork("v");
    let (text, large) = (codes(100_000, 2), dense(LARGE, 1));
    put(&bench.fs(id), "text", &text);
    put(&bench.fs(id), "large", &large);
    fail(&bench, id);
    bench.engine().gc(false).unwrap();
    assert!(get(&bench.fs(id), "text") == Some(text.clone()));
    bench.commit(id, false);
    bench.engine().gc(false).unwrap();
    shows(&bench, &[("text", &text), ("large", &large)]);
    check(&bench);
}

#[test]
fn a_fork_whose_commit_failed_leaves_no_spool_when_it_is_abandoned() {
    let bench = Bench::new();
    let id = bench.fork("v");
    put(&bench.fs(id), "f", &dense(LARGE, 1));
    fail(&bench, id);
    bench.engine().abandon(id).unwrap();
    no_strays(&bench);
}

#[test]
fn a_kept_spool_that_is_damaged_cut_short_or_gone_is_found_and_its_version_set_aside() {
    for how in ["damaged", "cut short", "gone"] {
        let bench = Bench::new();
        let id = bench.fork("v");
        put(&bench.fs(id), "whole", b"text");
        bench.commit(id, false);
        let id = bench.fork("v");
        put(&bench.fs(id), "f", &dense(LARGE, 1));
        bench.commit(id, false);
        takes(&bench, about(LARGE));
        let file = fs::File::options().write(true).open(&kept(&bench)[0]);
        match how {
            "damaged" => file.unwrap().write_all_at(b"!", 500_000).unwrap(),
            "cut short" => file.unwrap().set_len(500_000).unwrap(),
            _ => fs::remove_file(&kept(&bench)[0]).unwrap(),
        }
        let problems = bench.engine().check().unwrap().problems;
        if how == "damaged" {
            assert_eq!(problems.len(), 1, "{problems:?}");
        }
        let named = problems.iter().all(|problem| problem.paths == ["/f"]);
        assert!(named && !problems.is_empty(), "{how}: {problems:?}");
        bench.engine().gc(false).unwrap();
    }
}

#[test]
fn a_store_is_of_the_format_that_keeps_spools_when_the_first_is_kept() {
    let bench = Bench::new();
    let state = || fs::read_to_string(bench.path().join("state")).unwrap();
    let id = bench.fork("v");
    put(&bench.fs(id), "f", b"text");
    bench.commit(id, false);
    assert_eq!(state(), "format 1\n");
    let id = bench.fork("v");
    put(&bench.fs(id), "dense", &dense(LARGE, 1));
    bench.commit(id, false);
    assert_eq!(state(), "format 3\n");
}

#[test]
fn a_commit_of_a_small_change_reads_nothing_of_the_rest_of_a_long_file() {
    let mut bench = Bench::new();
    bench.threads = 4;
    bench.reopen();
    let id = bench.fork("v");
    let mut bytes = dense(32 << 20, 1);
    put(&bench.fs(id), "f", &bytes);
    bench.commit(id, false);
    let id = bench.fork("v");
    let fs = bench.fs(id);
    let ino = fs.lookup(ROOT, b"f").unwrap().unwrap().ino;
    fs.write(ME, ino, 1 << 20, b"changed", false).unwrap();
    bytes[1 << 20..][..7].copy_from_slice(b"changed");
    // Whoever reads behind this fails.
    let spool = &kept(&bench)[0];
    let file = fs::File::options().write(true).open(spool).unwrap();
    let (at, whole) = (4 << 20, fs::read(spool).unwrap());
    file.write_all_at(&vec![0; whole.len() - at], at as u64)
        .unwrap();
    assert_eq!(bench.commit(id, false), Some(2));
    file.write_all_at(&whole, 0).unwrap();
    shows(&bench, &[("f", &bytes)]);
}

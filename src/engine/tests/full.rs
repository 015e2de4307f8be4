//! A disk without room under the store, and a database that had to be opened again for it.

use super::content::ingest_ahead;
use super::faults::{kill, no_strays};
use super::*;
use crate::store::Step;

/// Lets the database lose what is not flushed when a step is reached, so many times.
fn lose_at(bench: &Bench, at: Step, times: usize) {
    let store = Arc::downgrade(&bench.engine().store);
    let count = AtomicUsize::new(0);
    bench.engine().store.steps.watch();
    bench.engine().store.steps.meanwhile(move |step| {
        if step == at && count.fetch_add(1, Ordering::AcqRel) < times {
            store.upgrade().unwrap().lose_what_is_not_flushed();
        }
    });
}

/// The next write is done and answered with an error, and the disk is full then.
fn fill_behind_the_next_write(bench: &Bench) {
    let store = Arc::downgrade(&bench.engine().store);
    let steps = &bench.engine().store.steps;
    steps.doubt();
    steps.meanwhile(move |step| {
        if step == Step::Written {
            store.upgrade().unwrap().steps.fill(true);
        }
    });
}

/// A fork with more than is written in one batch with its commit.
fn large_fork(bench: &Bench) -> ForkId {
    let id = bench.fork("v");
    for n in 0..60 {
        put(&bench.fs(id), &format!("f{n}"), &noise(200_000, n + 1));
    }
    id
}

fn shows_all(bench: &Bench) {
    let fork = bench.fork("v");
    for n in 0..60 {
        let found = get(&bench.fs(fork), &format!("f{n}"));
        assert_eq!(found, Some(noise(200_000, n + 1)), "f{n}");
    }
    bench.engine().abandon(fork).unwrap();
}

#[test]
fn a_commit_whose_content_went_with_the_database_is_made_all_the_same() {
    for keep in [false, true] {
        for at in [Step::Ingested, Step::Spilling] {
            println!("keep {keep}, lost at {at:?}");
            let mut bench = Bench::copying();
            let id = large_fork(&bench);
            lose_at(&bench, at, 1);
            assert_eq!(bench.commit(id, keep), Some(1));
            let seen = bench.engine().store.steps.seen();
            assert_eq!(seen[&Step::Sealed], 2, "it was begun again");
            bench.engine().store.steps.over();
            check(&bench);
            if keep {
                put(&bench.fs(id), "later", b"more");
                assert_eq!(bench.commit(id, false), Some(2));
            }
            kill(&mut bench);
            check(&bench);
            shows_all(&bench);
        }
    }
}

#[test]
fn a_commit_that_loses_its_content_again_and_again_is_refused_and_its_fork_goes_on() {
    for keep in [false, true] {
        let bench = Bench::copying();
        let id = large_fork(&bench);
        lose_at(&bench, Step::Ingested, usize::MAX);
        let error = bench.engine().commit(vec![id], request(keep)).unwrap_err();
        assert!(error.message.contains("run the command again"), "{error}");
        bench.engine().store.steps.over();
        put(&bench.fs(id), "later", b"more");
        assert_eq!(bench.commit(id, false), Some(1));
        shows_all(&bench);
        check(&bench);
    }
}

#[test]
fn a_commit_whose_write_was_done_and_answered_with_an_error_is_a_commit() {
    for (keep, changed) in [(false, true), (true, true), (false, false)] {
        println!("keep {keep}, changed {changed}");
        let mut bench = Bench::new();
        let first = bench.fork("v");
        put(&bench.fs(first), "f", b"text");
        bench.commit(first, false);
        let id = bench.fork("v");
        if changed {
            put(&bench.fs(id), "more", b"text");
        }
        bench.engine().store.steps.doubt();
        assert_eq!(bench.commit(id, keep), changed.then_some(2));
        if keep {
            put(&bench.fs(id), "later", b"text");
            assert_eq!(bench.commit(id, false), Some(3));
        }
        assert!(bench.engine().forks().unwrap().is_empty());
        let head = bench.engine().volume("v").unwrap().head;
        kill(&mut bench);
        assert_eq!(bench.engine().volume("v").unwrap().head, head);
        assert!(bench.engine().forks().unwrap().is_empty());
        no_strays(&bench);
        check(&bench);
    }
}

#[test]
fn a_fork_whose_commit_turns_out_to_be_done_after_it_was_refused_is_there_for_the_next_daemon() {
    let mut bench = Bench::new();
    let id = bench.fork("v");
    put(&bench.fs(id), "f", b"text");
    fill_behind_the_next_write(&bench);
    let refused = bench.engine().commit(vec![id], request(false));
    assert!(refused.is_err());
    let steps = &bench.engine().store.steps;
    steps.over();
    steps.fill(false);
    put(&bench.fs(id), "later", b"text");
    // Somebody else may be busy with it at that moment.
    let until = Instant::now() + Duration::from_secs(20);
    while bench.engine().store.forks().unwrap().is_empty() {
        assert!(Instant::now() < until);
        bench.engine().look_after();
    }
    assert_eq!(bench.engine().volume_record("v").unwrap().head, 1);
    kill(&mut bench);
    let fs = bench.fs(id);
    for name in ["f", "later"] {
        assert_eq!(get(&fs, name), Some(b"text".to_vec()), "{name}");
    }
    drop(fs);
    assert_eq!(bench.commit(id, false), Some(2));
    check(&bench);
}

#[test]
fn a_move_to_a_private_root_that_turns_out_to_be_done_after_it_failed_costs_its_fork_nothing() {
    let mut bench = Bench::new();
    let id = bench.fork("v");
    put(&bench.fs(id), "f", &noise(30_000, 1));
    let live = bench.engine().live(id).unwrap();
    fill_behind_the_next_write(&bench);
    assert!(bench.engine().move_to_private_root(&live).is_err());
    let steps = &bench.engine().store.steps;
    steps.over();
    steps.fill(false);
    let until = Instant::now() + Duration::from_secs(20);
    while live.in_doubt.load(Ordering::Acquire) {
        assert!(Instant::now() < until);
        bench.engine().look_after();
    }
    drop(live);
    put(&bench.fs(id), "later", b"text");
    // Nothing that lives has that root.
    bench.engine().gc(false).unwrap();
    kill(&mut bench);
    let fs = bench.fs(id);
    assert_eq!(get(&fs, "f"), Some(noise(30_000, 1)));
    assert_eq!(get(&fs, "later"), Some(b"text".to_vec()));
    drop(fs);
    assert_eq!(bench.commit(id, false), Some(1));
    check(&bench);
}

#[test]
fn content_that_goes_just_when_another_commit_has_found_it_is_stored_once_more() {
    let bench = Bench::copying();
    let (a, b) = (bench.fork("a"), bench.fork("b"));
    for id in [a, b] {
        put(&bench.fs(id), "large", &noise(12 << 20, 7));
    }
    ingest_ahead(&bench, a);
    let store = Arc::downgrade(&bench.engine().store);
    let gone = AtomicUsize::new(0);
    bench.engine().store.steps.watch();
    bench.engine().store.steps.meanwhile(move |step| {
        if step == Step::Taken && gone.fetch_add(1, Ordering::AcqRel) == 0 {
            store.upgrade().unwrap().lose_and_open_again();
        }
    });
    assert_eq!(bench.commit(b, false), Some(1));
    bench.engine().store.steps.over();
    check(&bench);
    let found = get(&bench.fs(bench.fork("b")), "large");
    assert_eq!(found, Some(noise(12 << 20, 7)));
}

#[test]
fn a_fork_abandoned_on_a_full_disk_is_over_for_every_later_daemon_too() {
    let mut bench = Bench::new();
    let ids = ["v", "w"].map(|volume| {
        let id = bench.fork(volume);
        put(&bench.fs(id), "f", &noise(300_000, 1));
        id
    });
    bench.engine().store.steps.fill(true);
    assert!(bench.engine().abandon(ids[0]).unwrap().is_empty());
    assert!(bench.engine().find_fork(&ids[0].to_string()).is_err());
    assert!(!bench.engine().fork_dir(ids[0]).exists());

    // The daemon ends while the record is there.
    kill(&mut bench);
    let forks = bench.engine().forks().unwrap();
    let left: Vec<&str> = forks.iter().map(|fork| fork.id.as_str()).collect();
    assert_eq!(left, [ids[1].to_string()]);
    assert_eq!(forks[0].state, "unmounted", "the other one is as it was");
    no_strays(&bench);
    assert_eq!(bench.engine().store.forks().unwrap().len(), 1);

    // It goes on, and there is room again.
    bench.engine().store.steps.fill(true);
    bench.engine().abandon(ids[1]).unwrap();
    assert_eq!(bench.engine().store.forks().unwrap().len(), 1);
    bench.engine().store.steps.fill(false);
    bench.engine().forget();
    assert!(bench.engine().store.forks().unwrap().is_empty());
    no_strays(&bench);
    check(&bench);
}

#[test]
fn a_fork_that_can_neither_be_forgotten_nor_put_aside_is_not_said_to_be_abandoned() {
    let bench = Bench::new();
    let id = bench.fork("v");
    put(&bench.fs(id), "f", b"text");
    // A folder cannot take the name of one that is not empty.
    let aside = bench.engine().fork_dir(id).with_extension("gone");
    std::fs::create_dir_all(aside.join("in the way")).unwrap();
    bench.engine().store.steps.fill(true);
    let error = bench.engine().abandon(id).unwrap_err();
    assert_eq!(error.code, Code::NoSpace);
    bench.engine().store.steps.fill(false);
    assert_eq!(get(&bench.fs(id), "f"), Some(b"text".to_vec()));
    std::fs::remove_dir_all(aside).unwrap();
    bench.engine().abandon(id).unwrap();
}

//! What goes by itself, and what never does.

use super::*;
use crate::store::Step;

const DAY: i64 = 24 * 3600 * 1_000_000_000;

fn commit_one(bench: &Bench, volume: &str, seed: u64) {
    let id = bench.fork(volume);
    put(&bench.fs(id), &format!("f{seed}"), &noise(100_000, seed));
    bench.commit(id, false).unwrap();
}

/// > `forkvol gc` does it at once; `--dry-run` only says what would go. `stats` counts it.
#[test]
fn gc_lets_unused_volumes_go_and_says_so_before() {
    let bench = Bench::new();
    for volume in ["forked", "pinned", "unused"] {
        commit_one(&bench, volume, 1);
    }
    bench.engine().pin("pinned", true).unwrap();
    let fork = bench.fork("forked");
    let later = now() + 15 * DAY;
    let retain = |dry_run| bench.engine().retain(later, 0, dry_run).unwrap();
    assert_eq!(retain(true), (vec!["unused".into()], vec![]));
    assert!(bench.engine().volume("unused").is_ok());
    assert_eq!(retain(false), (vec!["unused".into()], vec![]));
    assert!(bench.engine().volume("unused").is_err());
    assert_eq!(bench.engine().counters()["removed_volumes"], 1);
    assert_eq!(get(&bench.fs(fork), "f1"), Some(noise(100_000, 1)));
    assert_eq!(bench.engine().volume("pinned").unwrap().versions, 1);

    commit_one(&bench, "old", 1);
    let id = bench.engine().volume_record("old").unwrap().id;
    bench
        .engine()
        .store
        .touch_volume(id, now() - 15 * DAY)
        .unwrap();
    assert_eq!(bench.engine().gc(true).unwrap().volumes, ["old"]);
    assert!(bench.engine().volume("old").is_ok());
    assert_eq!(bench.engine().gc(false).unwrap().volumes, ["old"]);
    assert!(bench.engine().volume("old").is_err());
    assert_eq!(bench.engine().counters()["removed_volumes"], 2);
}

/// > A volume that was neither forked nor committed for 14 days goes, head included.
#[test]
fn forking_a_volume_is_using_it() {
    let bench = Bench::new();
    commit_one(&bench, "v", 1);
    commit_one(&bench, "of", 1);
    let old = now() - 20 * DAY;
    for name in ["v", "of"] {
        let id = bench.engine().volume_record(name).unwrap().id;
        bench.engine().store.touch_volume(id, old).unwrap();
    }
    let fork = bench.fork_with("v", |request| request.from = Some("of@1".into()));
    bench.engine().abandon(fork).unwrap();
    let gone = bench.engine().retain(now(), 0, true).unwrap();
    assert_eq!(gone, (vec![], vec![]));
}

#[test]
fn versions_beyond_the_newest_go_but_for_the_bases_of_forks() {
    let bench = Bench::new();
    commit_one(&bench, "v", 1);
    let fork = bench.fork("v");
    for seed in 2..=13 {
        commit_one(&bench, "v", seed);
    }
    let gone = bench.engine().retain(now() + 2 * DAY, 0, false).unwrap();
    assert_eq!(gone, (vec![], vec!["v@3".into(), "v@2".into()]));
    bench.engine().gc(false).unwrap();
    assert_eq!(get(&bench.fs(fork), "f1"), Some(noise(100_000, 1)));
    assert_eq!(bench.engine().volume("v").unwrap().versions, 11);
    check(&bench);
}

#[test]
fn what_was_forked_is_there_however_retention_and_forks_meet() {
    let bench = Bench::new();
    std::thread::scope(|scope| {
        let forking = scope.spawn(|| {
            for seed in 1..=100 {
                commit_one(&bench, "v", seed);
                let fork = bench.fork("v");
                let info = bench.engine().find_fork(&fork.to_string()).unwrap();
                if let Some(base) = info.base {
                    assert!(bench.engine().find_version(&base).is_ok(), "{base}");
                }
                bench.engine().abandon(fork).unwrap();
            }
        });
        while !forking.is_finished() {
            let later = now() + 15 * DAY;
            bench.engine().retain(later, 0, false).unwrap();
        }
    });
    check(&bench);
}

/// > While that is not enough, new forks are refused.
#[test]
fn a_store_that_takes_too_much_refuses_forks_when_nothing_more_may_go() {
    for (limit, min_free, says) in [
        (Some(1), Some(0), "beyond the limit"),
        (None, Some(u64::MAX), "less than `min-free` left"),
    ] {
        let mut bench = Bench::new();
        commit_one(&bench, "v", 1);
        (bench.retention.limit, bench.retention.min_free) = (limit, min_free);
        bench.reopen();
        let look = Instant::now() + Duration::from_secs(3600);
        bench.engine().tend(look);
        for _ in 0..2 {
            let error = bench.engine().fork(fork_request("v")).unwrap_err();
            assert_eq!(error.code, Code::NoSpace);
            assert!(error.message.contains(says), "{error}");
            // Not tried again within the hour.
            bench.engine().tend(look + Duration::from_secs(600));
        }
        let kept = bench.engine().volume("v").unwrap().versions;
        assert_eq!(kept, 1, "it is in use");
        let counters = bench.engine().counters();
        assert_eq!((counters["gcs"], counters["forks"]), (1, 0));
        assert_eq!((counters["degraded_no_space"], counters["refused"]), (2, 2));
        (bench.retention.limit, bench.retention.min_free) = (None, Some(0));
        bench.reopen();
        bench.fork("v");
    }
}

/// > The daemon does it once a day, and within a minute or so of running short.
#[test]
fn the_daemon_lets_go_once_a_day_and_soon_after_it_runs_short() {
    let mut bench = Bench::new();
    let unused = |bench: &Bench, name: &str| {
        commit_one(bench, name, 1);
        let id = bench.engine().volume_record(name).unwrap().id;
        bench
            .engine()
            .store
            .touch_volume(id, now() - 20 * DAY)
            .unwrap();
    };
    let is_there = |bench: &Bench, name: &str| bench.engine().volume(name).is_ok();
    let begun = Instant::now();
    let after = |seconds| begun + Duration::from_secs(seconds);
    unused(&bench, "a");
    bench.engine().tend(after(10));
    assert!(is_there(&bench, "a"), "whoever comes for it is waited for");
    bench.engine().tend(after(100));
    assert!(!is_there(&bench, "a"));
    unused(&bench, "b");
    bench.engine().tend(after(12 * 3600));
    assert!(is_there(&bench, "b"), "not more than once a day");
    bench.engine().tend(after(25 * 3600));
    assert!(!is_there(&bench, "b"));

    let taken = bench.engine().store.disk_bytes();
    bench.retention.limit = Some(taken + (8 << 20));
    bench.reopen();
    bench.engine().tend(after(100));
    let id = bench.fork("c");
    put(&bench.fs(id), "f", &noise(20 << 20, 1));
    bench.commit(id, false).unwrap();
    bench.engine().store.flush().unwrap();
    let id = bench.engine().volume_record("c").unwrap().id;
    let store = &bench.engine().store;
    store.touch_volume(id, now() - DAY / 2).unwrap();
    bench.engine().tend(after(110));
    assert!(is_there(&bench, "c"), "it was looked after a moment ago");
    bench.engine().tend(after(200));
    assert!(!is_there(&bench, "c"), "long before the next day");
}

#[test]
fn a_gc_ends_at_its_next_step_when_the_daemon_stops_and_the_next_one_does_the_rest() {
    let steps = [Step::Marked, Step::Swept, Step::Compacted];
    for (nth, at) in steps.into_iter().enumerate() {
        println!("stopped at {at:?}");
        let mut bench = Bench::new();
        commit_one(&bench, "gone", 1);
        commit_one(&bench, "v", 2);
        bench.engine().remove_volume("gone", false).unwrap();
        let engine = Arc::downgrade(bench.engine());
        let store = bench.engine().store.clone();
        store.steps.watch();
        store.steps.meanwhile(move |step| {
            if step == at {
                engine.upgrade().unwrap().drain();
            }
        });
        let error = bench.engine().gc(false).unwrap_err();
        assert_eq!(error.code, Code::Busy, "{error}");
        let seen = store.steps.seen();
        assert_eq!(seen[&at], 1);
        for later in &steps[nth + 1..] {
            assert!(!seen.contains_key(later), "{later:?}");
        }
        store.steps.over();
        drop(store);
        bench.engine().shutdown(false).unwrap();
        bench.reopen();
        check(&bench);
        bench.engine().store.steps.watch();
        bench.engine().gc(false).unwrap();
        let seen = bench.engine().store.steps.seen();
        assert!(seen.contains_key(&Step::Compacted), "the room is owed");
        let left = bench.engine().gc(true).unwrap().garbage;
        assert_eq!((left.removed_nodes, left.removed_chunks), (0, 0));
        assert_eq!(
            get(&bench.fs(bench.fork("v")), "f2"),
            Some(noise(100_000, 2))
        );
    }
}

//! A whole gc, and a whole commit of the same content, at every step of a commit, and a commit at every step of a gc: each version
//! is whole all the same.

use super::faults::{bench_on, fork_of, kill, some_of};
use super::private_root::view;
use super::*;
use crate::store::Step;

/// How long one waits for what goes on beside it, which may have to wait for it.
const PATIENCE: Duration = Duration::from_millis(200);

/// Does something, and runs `beside` in another thread when that reaches a step for the `nth` time.
fn with(bench: &Bench, at: (Step, usize), beside: fn(&Engine), act: impl FnOnce()) {
    let running = Arc::new(Mutex::new(None));
    let (engine, started) = (bench.engine().clone(), running.clone());
    let count = AtomicUsize::new(0);
    let steps = &bench.engine().store.steps;
    steps.meanwhile(move |step| {
        if step != at.0 || count.fetch_add(1, Ordering::AcqRel) + 1 != at.1 {
            return;
        }
        let engine = engine.clone();
        let thread = std::thread::spawn(move || beside(&engine));
        let until = Instant::now() + PATIENCE;
        while !thread.is_finished() && Instant::now() < until {
            std::thread::yield_now();
        }
        *started.lock() = Some(thread);
    });
    act();
    let thread: Option<std::thread::JoinHandle<()>> = running.lock().take();
    thread.expect("the step was reached").join().unwrap();
    steps.over();
}

/// Two forks with the same content, which lies in the store as garbage too.
fn furnish(bench: &Bench, len: usize) {
    for volume in ["garbage", "v", "w"] {
        let id = bench.fork(volume);
        let fs = bench.fs(id);
        for n in 0..4 {
            put(&fs, &format!("f{n}"), &noise(len, 1 + n));
        }
        put(&fs, "own", &noise(10_000, volume.len() as u64 + 50));
        if volume == "garbage" {
            bench.commit(id, false);
            bench.engine().remove_volume("garbage", false).unwrap();
        }
    }
}

fn run(len: usize, beside: fn(&Engine)) {
    let mut made = Bench::new();
    furnish(&made, len);
    made.close();
    let template = made.path();
    let plain = bench_on(&template, &made.retention);
    let forks = ["v", "w"].map(|volume| fork_of(&plain, volume).unwrap());
    let [v, w] = forks.map(|id| view(&plain.fs(id)));
    plain.engine().store.steps.watch();
    plain.commit(forks[0], false).unwrap();
    let reached = plain.engine().store.steps.seen();
    drop(plain);

    let mut seed = u64::from(std::process::id()) | 1;
    for (step, count) in reached {
        for nth in some_of(count, &mut seed) {
            println!("at {step:?}, {nth} of {count}");
            let mut bench = bench_on(&template, &made.retention);
            let committed = fork_of(&bench, "v").unwrap();
            with(&bench, (step, nth), beside, || {
                bench.commit(committed, false).unwrap();
            });
            check(&bench);
            if let Some(id) = fork_of(&bench, "w") {
                bench.commit(id, false).unwrap();
            }
            kill(&mut bench);
            check(&bench);
            bench.engine().gc(false).unwrap();
            check(&bench);
            for (volume, shown) in [("v", &v), ("w", &w)] {
                let fork = bench.fork(volume);
                assert!(view(&bench.fs(fork)) == *shown, "{volume}");
                bench.engine().abandon(fork).unwrap();
            }
            let left = bench.engine().gc(true).unwrap().garbage;
            assert_eq!((left.removed_nodes, left.removed_chunks), (0, 0));
        }
    }
}

fn gc(engine: &Engine) {
    engine.gc(false).unwrap();
}

fn commit_and_gc(engine: &Engine) {
    let forks = engine.forks().unwrap().into_iter();
    let forks = forks.filter(|fork| fork.volume == "w");
    let ids = forks.map(|fork| fork.id.parse().unwrap()).collect();
    engine.commit(ids, request(false)).unwrap();
    gc(engine);
}

#[test]
fn a_gc_at_every_step_of_a_commit_takes_nothing_from_it() {
    run(100_000, gc);
}

#[test]
fn a_gc_at_every_step_of_a_large_commit_takes_nothing_from_it() {
    run(4 << 20, gc);
}

#[test]
fn a_commit_and_a_gc_at_every_step_of_a_commit_leave_both_versions_whole() {
    run(100_000, commit_and_gc);
}

#[test]
fn a_commit_and_a_gc_at_every_step_of_a_large_commit_leave_both_versions_whole() {
    run(4 << 20, commit_and_gc);
}

/// A fork of one volume becomes the first version of another, and then the first one goes.
fn move_on(engine: &Engine) {
    let mut wanted = fork_request("a");
    wanted.parents = vec!["z".into()];
    let id: ForkId = engine.fork(wanted).unwrap().id.parse().unwrap();
    put(&engine.fs_of(id).unwrap(), "small", b"text");
    engine.commit(vec![id], request(false)).unwrap();
    engine.remove_volume("z", false).unwrap();
}

#[test]
fn what_goes_from_one_volume_to_another_at_any_step_of_a_gc_stays() {
    for (step, nth) in [
        (Step::Marking, 1),
        (Step::Marked, 1),
        (Step::Swept, 1),
        (Step::Swept, 2),
    ] {
        println!("at {step:?}, {nth}");
        let bench = Bench::new();
        let z = bench.fork("z");
        for n in 0..300 {
            put(&bench.fs(z), &format!("f{n}"), &noise(2000, 1 + n));
        }
        bench.commit(z, false);
        with(&bench, (step, nth), move_on, || {
            bench.engine().gc(false).unwrap();
        });
        check(&bench);
        let fs = bench.fs(bench.fork("a"));
        for n in 0..300 {
            assert_eq!(get(&fs, &format!("f{n}")), Some(noise(2000, 1 + n)));
        }
    }
}

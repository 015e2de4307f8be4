//! What a commit asks of the head holds at the moment it is published, whatever was published while it was ingested.

use super::*;
use crate::store::Step;

/// A volume with two versions, and two forks of the second.
fn furnished() -> (Bench, [ForkId; 2]) {
    let bench = Bench::new();
    for name in ["first", "second"] {
        let id = bench.fork("v");
        put(&bench.fs(id), name, b"text");
        bench.commit(id, false);
    }
    let forks = [(); 2].map(|()| bench.fork("v"));
    for (n, id) in forks.into_iter().enumerate() {
        put(&bench.fs(id), &format!("own{n}"), b"text");
    }
    (bench, forks)
}

/// Commits a fork; something else is done at a step of that.
fn commit_with(
    bench: &Bench,
    id: ForkId,
    wanted: &CommitRequest,
    at: Step,
    beside: impl Fn(&Engine) + Send + Sync + 'static,
) -> Result<Option<u64>> {
    let (engine, count) = (bench.engine().clone(), AtomicUsize::new(0));
    bench.engine().store.steps.meanwhile(move |step| {
        if step == at && count.fetch_add(1, Ordering::AcqRel) == 0 {
            beside(&engine);
        }
    });
    let done = bench.engine().commit(vec![id], wanted.clone());
    bench.engine().store.steps.over();
    Ok(done?[0].version.as_ref().map(|version| version.number))
}

fn head(bench: &Bench) -> u64 {
    bench.engine().volume_record("v").unwrap().head
}

#[test]
fn of_two_commits_at_once_that_want_the_head_as_it_was_one_is_refused() {
    for step in [Step::Sealed, Step::Gathered] {
        let (bench, [one, other]) = furnished();
        let wanted = CommitRequest {
            if_base: true,
            ..request(false)
        };
        let faster = wanted.clone();
        let refused = commit_with(&bench, one, &wanted, step, move |engine| {
            engine.commit(vec![other], faster.clone()).unwrap();
        });
        let error = refused.unwrap_err();
        assert_eq!(error.code, Code::HeadMoved, "{error}");
        assert_eq!(head(&bench), 3);
        assert_eq!(get(&bench.fs(one), "own0"), Some(b"text".to_vec()));
        assert_eq!(bench.commit(one, false), Some(4), "it goes on");
    }
}

#[test]
fn a_rollback_during_a_commit_stays_and_the_commit_is_refused() {
    for step in [Step::Sealed, Step::Gathered] {
        let (bench, [one, _]) = furnished();
        let refused = commit_with(&bench, one, &request(false), step, |engine| {
            engine.rollback("v", "1").unwrap();
        });
        let error = refused.unwrap_err();
        assert_eq!(error.code, Code::HeadMoved, "{error}");
        assert_eq!(head(&bench), 3);
        assert_eq!(get(&bench.fs(bench.fork("v")), "second"), None);
    }
}

#[test]
fn of_two_commits_at_once_that_want_nothing_the_last_one_wins_and_is_whole() {
    for keep in [false, true] {
        let (bench, [one, other]) = furnished();
        let large = noise(3 << 20, 5);
        put(&bench.fs(one), "large", &large);
        let done = commit_with(&bench, one, &request(keep), Step::Gathered, move |engine| {
            engine.commit(vec![other], request(false)).unwrap();
        });
        assert_eq!(done.unwrap(), Some(4));
        check(&bench);
        let fs = bench.fs(bench.fork("v"));
        assert_eq!(get(&fs, "own0"), Some(b"text".to_vec()));
        assert_eq!(get(&fs, "own1"), None);
        assert!(get(&fs, "large") == Some(large));
    }
}

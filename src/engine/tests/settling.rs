//! What stays is compressed once more in the background, when nobody is in its way.

use super::*;

#[test]
fn what_stays_is_settled_in_the_background_if_there_is_room_and_nobody_commits() {
    let mut bench = Bench::new();
    let id = bench.fork("v");
    let words: Vec<String> = noise(60_000, 1)
        .iter()
        .map(|b| format!("word{b} "))
        .collect();
    let words = words.concat().into_bytes();
    put(&bench.fs(id), "f", &words);
    bench.commit(id, false);
    let days = 86_400 * 1_000_000_000;
    let store = &bench.engine().store;
    for before in [3, 2] {
        store.settle(now() - before * days, &|| true).unwrap();
    }
    store.flush().unwrap();
    let settled = |bench: &Bench| {
        *bench.engine().settling.next.lock() = Instant::now();
        bench.engine().settle_in_background();
        bench.engine().stats().unwrap().settled_chunks
    };

    let limit = store.disk_bytes() * 3 / 2;
    let plenty = std::mem::replace(&mut bench.retention, Policy::new(Some(limit), Some(0)));
    bench.reopen();
    assert_eq!(settled(&bench), 0, "the store may not grow so far");

    bench.retention = plenty;
    bench.reopen();
    let id = bench.fork("v");
    let live = bench.engine().live(id).unwrap();
    let commit = live.committing.lock();
    assert_eq!(settled(&bench), 0, "somebody commits");

    drop(commit);
    assert!(settled(&bench) > 0);
    assert!(bench.engine().stats().unwrap().saved_bytes > 0);
    assert_eq!(get(&bench.fs(id), "f"), Some(words));
    check(&bench);
}

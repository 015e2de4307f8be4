use super::plan::{FIRST, File, KEPT, MOST, Plan, TRUST};
use crate::record::Ino;

/// Files from this number on.
fn files(from: u64, count: u64, size: u32) -> Vec<File> {
    let file = |n| File { ino: Ino(n), size };
    (from..from + count).map(file).collect()
}

/// Reads with all the room there is; returns the numbers of what is pushed.
fn read(plan: &mut Plan, ino: u64) -> Vec<u64> {
    let pushed = plan.read(Ino(ino), MOST);
    pushed.iter().map(|file| file.ino.0).collect()
}

/// A plan that trusts its reader.
fn trusting() -> Plan {
    let mut plan = Plan::default();
    plan.listed(Ino(1), true, files(10, 2, 1));
    read(&mut plan, 10);
    read(&mut plan, 11);
    plan
}

#[test]
fn a_walk_pushes_nothing_nor_does_one_read_in_each_folder() {
    let mut plan = Plan::default();
    for dir in 1..100 {
        plan.listed(Ino(dir), true, files(dir * 1000, 10, 1));
    }
    for dir in 1..100 {
        assert_eq!(read(&mut plan, dir * 1000 + 5), [0; 0]);
    }
}

#[test]
fn the_second_read_in_a_folder_pushes_the_rest_of_it_whatever_lies_between() {
    let mut plan = Plan::default();
    plan.listed(Ino(1), true, files(10, 5, 1));
    plan.listed(Ino(2), true, files(20, 5, 1));
    assert_eq!(read(&mut plan, 12), [0; 0]);
    assert_eq!(read(&mut plan, 20), [0; 0]);
    assert_eq!(read(&mut plan, 13), [14, 10, 11]);
    for again in 10..15 {
        assert_eq!(read(&mut plan, again), [0; 0], "nothing is pushed twice");
    }
}

/// The numbers of what is pushed when all of a folder was listed.
fn listed_all(plan: &mut Plan, dir: u64) -> Vec<u64> {
    let pushed = plan.listed_all(Ino(dir), MOST);
    pushed.iter().map(|file| file.ino.0).collect()
}

#[test]
fn a_trusted_reader_gets_so_many_folders_from_their_first_read_on_and_no_more() {
    let mut plan = trusting();
    let last = 12 + u64::from(TRUST);
    for dir in 2..=last {
        plan.listed(Ino(dir), true, files(dir * 100, 3, 1));
        let (first, trusted) = (dir * 100, dir < 2 + u64::from(TRUST));
        let rest = if trusted {
            vec![first + 1, first + 2]
        } else {
            vec![]
        };
        assert_eq!(read(&mut plan, first), rest, "folder {dir}");
    }
    assert_eq!(read(&mut plan, last * 100 + 1), [last * 100 + 2]);
    plan.listed(Ino(1), true, files(10, 3, 1));
    assert_eq!(read(&mut plan, 10), [11, 12], "it is trusted again");
}

#[test]
fn a_trusted_reader_who_has_listed_a_folder_gets_it_before_it_is_read() {
    let mut plan = trusting();
    for dir in 2..12 + u64::from(TRUST) {
        let (first, trusted) = (dir * 100, dir < 2 + u64::from(TRUST));
        plan.listed(Ino(dir), true, files(first, 1, 1));
        plan.listed(Ino(dir), false, files(first + 1, 1, 1));
        let all = if trusted {
            vec![first, first + 1]
        } else {
            vec![]
        };
        assert_eq!(listed_all(&mut plan, dir), all, "folder {dir}");
        assert_eq!(listed_all(&mut plan, dir), [0; 0], "listed again");
    }
    let mut plan = trusting();
    assert_eq!(listed_all(&mut plan, 1), [0; 0], "is read already");
    assert_eq!(listed_all(&mut plan, 2), [0; 0], "has no small files");
    plan.listed(Ino(2), true, files(100, 300, 1 << 10));
    assert_eq!(listed_all(&mut plan, 2).len(), 256);
    assert_eq!(read(&mut plan, 356).len(), 43, "the reader goes on");
}

#[test]
fn windows_grow_while_the_reader_goes_on_where_they_end_and_stay_below_a_bound() {
    let size = 64 << 10;
    let mut plan = trusting();
    plan.listed(Ino(2), true, files(1000, 1000, size));
    let (mut at, mut window) = (1000, FIRST);
    for _ in 0..8 {
        let pushed = read(&mut plan, at);
        let expected: Vec<u64> = (at + 1..=at + window / u64::from(size)).collect();
        assert_eq!(pushed, expected);
        at += 1 + pushed.len() as u64;
        window = (window * 2).min(MOST);
    }
}

#[test]
fn a_reader_who_reads_here_and_there_gets_one_window() {
    let mut plan = trusting();
    plan.listed(Ino(2), true, files(1000, 1000, 4096));
    assert_eq!(read(&mut plan, 1500).len() as u64, FIRST / 4096);
    for ino in (1010..1490).chain(1600..2000).step_by(7) {
        assert_eq!(read(&mut plan, ino), [0; 0]);
    }
}

#[test]
fn no_more_is_pushed_than_there_is_room_for_and_the_reader_goes_on_from_there() {
    let mut plan = trusting();
    plan.listed(Ino(2), true, files(1000, 10, 1000));
    let pushed = plan.read(Ino(1000), 2500);
    assert_eq!(pushed, files(1001, 2, 1000));
    assert!(plan.read(Ino(1003), 0).is_empty());
    assert_eq!(plan.read(Ino(1004), 1000), files(1005, 1, 1000));
}

#[test]
fn a_file_of_several_names_is_pushed_once() {
    let mut plan = trusting();
    let twice = [files(1000, 3, 1), files(1000, 3, 1)].concat();
    plan.listed(Ino(2), true, twice);
    plan.listed(Ino(3), true, files(1001, 1, 1));
    assert_eq!(read(&mut plan, 1000), [1001, 1002]);
}

#[test]
fn a_folder_that_is_listed_again_starts_again() {
    let mut plan = trusting();
    for _ in 0..2 {
        plan.listed(Ino(2), true, files(1000, 2, 1));
        plan.listed(Ino(2), false, files(1002, 1, 1));
        assert_eq!(read(&mut plan, 1000), [1001, 1002]);
    }
    assert_eq!(plan.remembered(), 2 + 3);
}

#[test]
fn the_oldest_listings_are_forgotten_and_of_the_largest_folder_the_end() {
    let mut plan = Plan::default();
    let kept = KEPT as u64;
    for dir in 0..100 {
        plan.listed(Ino(dir), true, files(kept * 10 + dir * 1000, 1000, 1));
        assert!(plan.remembered() <= KEPT);
    }
    assert!(plan.remembered() > KEPT - 1000);
    for reply in 0..20 {
        plan.listed(
            Ino(1000),
            reply == 0,
            files(reply * kept / 10, kept / 10, 1),
        );
        assert!(plan.remembered() <= KEPT);
    }
    assert_eq!(read(&mut plan, 0), [0; 0]);
    assert_eq!(read(&mut plan, 1).len() as u64, kept - 2);
    assert_eq!(read(&mut plan, kept), [0; 0], "was not remembered");
}

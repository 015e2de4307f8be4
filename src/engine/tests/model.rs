//! Random work in several forks of one volume, against a model that is nothing but maps (`tree`): each fork shows its base and what
//! was done in it, and each version is exactly what its commit had before it.

use std::collections::BTreeSet;
use std::time::Duration;

use proptest::test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner};

use super::*;

mod compare;
mod steps;
mod tree;
mod xattr;

use compare::compare;
use steps::{Step, steps, work};
use tree::Tree;

const FORKS: usize = 3;

pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// A volume with its forks and versions, and what they are to be.
struct World {
    bench: Bench,
    acl: bool,
    versions: BTreeMap<u64, Tree>,
    forks: Vec<Forked>,
    turn: usize,
}

struct Forked {
    id: ForkId,
    tree: Tree,
    base: Option<u64>,
}

impl World {
    fn new(acl: bool) -> World {
        let mut world = World {
            bench: Bench::new(),
            acl,
            versions: BTreeMap::new(),
            forks: Vec::new(),
            turn: 0,
        };
        for _ in 0..FORKS {
            let fork = world.fork(None);
            world.forks.push(fork);
        }
        world
    }

    /// A fork of the head, or of the version that a number chooses.
    fn fork(&self, from: Option<u16>) -> Forked {
        let numbers: Vec<u64> = self.versions.keys().copied().collect();
        let base = match from {
            Some(pick) if !numbers.is_empty() => Some(numbers[usize::from(pick) % numbers.len()]),
            _ => numbers.last().copied(),
        };
        let id = self.bench.fork_with("v", |request| {
            request.acl = self.acl;
            request.from = base.map(|number| format!("v@{number}"));
        });
        let tree = base.map_or_else(
            || Tree::new(self.acl),
            |number| self.versions[&number].clone(),
        );
        Forked { id, tree, base }
    }

    fn step(&mut self, step: &Step) {
        let fork = &mut self.forks[self.turn];
        match *step {
            Step::Turn(turn) => {
                compare(&self.bench.fs(fork.id), &mut fork.tree);
                self.turn = usize::from(turn) % FORKS;
            }
            Step::Commit { keep } => self.commit(keep),
            Step::Abandon(from) => {
                self.bench.engine().abandon(fork.id).unwrap();
                self.forks[self.turn] = self.fork(from);
            }
            Step::Move => {
                let live = self.bench.engine().live(fork.id).unwrap();
                self.bench.engine().move_to_private_root(&live).unwrap();
                compare(&self.bench.fs(fork.id), &mut fork.tree);
            }
            Step::Restart => {
                self.bench.reopen();
                for fork in &mut self.forks {
                    fork.tree.end_session();
                    compare(&self.bench.fs(fork.id), &mut fork.tree);
                }
            }
            Step::Gc => drop(self.bench.engine().gc(false).unwrap()),
            _ => work(&self.bench.fs(fork.id), &mut fork.tree, step),
        }
    }

    fn commit(&mut self, keep: bool) {
        let fork = &mut self.forks[self.turn];
        compare(&self.bench.fs(fork.id), &mut fork.tree);
        let base = fork.base.map(|number| &self.versions[&number]);
        let said = base.is_none_or(|base| !fork.tree.is_like(base));
        let number = self.bench.commit(fork.id, keep);
        assert_eq!(number.is_some(), said, "whether there is a version to make");
        if let Some(number) = number {
            assert_eq!(number, self.versions.len() as u64 + 1);
            self.versions.insert(number, fork.tree.committed());
            fork.base = Some(number);
        }
        if keep {
            compare(&self.bench.fs(fork.id), &mut fork.tree);
        } else {
            self.forks[self.turn] = self.fork(None);
        }
    }

    /// Everything at the end: the forks, all versions, and the store.
    fn end(mut self) {
        for fork in &mut self.forks {
            compare(&self.bench.fs(fork.id), &mut fork.tree);
        }
        let log = self.bench.engine().log("v");
        for version in log.into_iter().flatten() {
            let mut fork = self.fork(Some(version.number as u16 - 1));
            compare(&self.bench.fs(fork.id), &mut fork.tree);
            let (number, files) = (version.number, fork.tree.nodes.len());
            assert_eq!(version.files, files as u64, "v@{number}");
            self.bench.engine().abandon(fork.id).unwrap();
        }
        check(&self.bench);
    }
}

fn run(acl: bool, steps: &[Step]) {
    let mut world = World::new(acl);
    for step in steps {
        world.step(step);
    }
    world.end();
}

/// What a seed stands for.
fn run_seed(seed: u64) {
    eprintln!("seed {seed}");
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config = Config {
        cases: 1,
        failure_persistence: None,
        max_shrink_time: 120_000,
        max_shrink_iters: 20_000,
        ..Config::default()
    };
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let done = runner.run(&(proptest::bool::ANY, steps()), |(acl, steps)| {
        run(acl, &steps);
        Ok(())
    });
    match done {
        Ok(()) => {}
        Err(TestError::Fail(why, (acl, steps))) => {
            panic!("seed {seed}, with ACLs: {acl}: {why}\n{steps:?}")
        }
        Err(error) => panic!("seed {seed}: {error}"),
    }
}

/// `FORKVOL_MODEL_SEED` runs one seed, `FORKVOL_MODEL_SECONDS` goes on for so long.
///
/// > A fork shows the version it was made from and its own changes, and nothing of other forks. It has extended attributes (`user`,
/// > `trusted`, `security`), and POSIX ACLs with inheritance where the fork was made with `--acl` or its base has some. It has
/// > their owners, modes, nanosecond times and creation times. Names are bytes.
#[test]
fn forks_and_versions_are_what_a_model_of_maps_says() {
    let number = |name| std::env::var(name).ok().map(|text| text.parse().unwrap());
    if let Some(seed) = number("FORKVOL_MODEL_SEED") {
        return run_seed(seed);
    }
    let time = Duration::from_secs(number("FORKVOL_MODEL_SECONDS").unwrap_or(8));
    let begun = Instant::now();
    (0..4).for_each(run_seed);
    // Others each time; what fails is printed above.
    let mut seed = u64::from(std::process::id()) << 32;
    while begun.elapsed() < time {
        seed += 1;
        run_seed(seed);
    }
}

/// They would be of no inode there, and make a version of what changed nothing.
#[test]
fn attributes_of_what_only_the_fork_goes_on_with_are_in_no_version() {
    let bench = Bench::new();
    let id = bench.fork_with("v", |request| request.excludes = vec!["/secret".into()]);
    let fs = bench.fs(id);
    let new = |kind| NewNode::new(kind, 0o755);
    let dir = fs.make(ME, ROOT, b"dir", new(Kind::Directory)).unwrap().ino;
    let (file, secret) = (put(&fs, "file", b"1"), put(&fs, "secret", b"2"));
    fs.rmdir(ME, ROOT, b"dir").unwrap();
    fs.unlink(ME, ROOT, b"file").unwrap();
    put(&fs, "plain", b"3");
    for (value, number) in [(b"a", Some(1)), (b"b", None), (b"c", None)] {
        for ino in [dir, file, secret] {
            fs.setxattr(ME, ino, b"user.x", value, XattrMode::Any)
                .unwrap();
        }
        assert_eq!(bench.commit(id, true), number);
        for ino in [dir, file, secret] {
            assert_eq!(fs.getxattr(ino, b"user.x").unwrap(), value);
        }
    }
    let other = bench.fs(bench.fork("v"));
    for ino in [dir, file, secret] {
        assert!(other.getxattr(ino, b"user.x").is_err(), "{ino:?}");
    }
    check(&bench);
}

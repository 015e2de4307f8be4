//! The daemon is killed again and again under a mixed load. What each worker was told is written down outside of the mounts, and
//! compared with what the next daemon shows: every acknowledged change, and heads exactly as they were acknowledged.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use forkvol::sys::mount;

use super::*;

/// So many kills, unless `FORKVOL_KILLS` says how many.
const KILLS: usize = 10;
const WORKERS: usize = 3;
const LARGEST: u64 = 60_000;
/// Of what nothing makes smaller: enough that a commit keeps it where it was written.
const DENSE: usize = 9 << 20;

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

type Model = BTreeMap<String, Arc<Vec<u8>>>;

/// A call: what a fork holds when it is done, and, of a write, the file, the offset and the length.
#[derive(Clone)]
struct Call {
    after: Model,
    write: Option<(String, usize, usize)>,
}

/// One thing that may be found: a state, or one on the way from it to the end of a call.
#[derive(Clone)]
struct May(Model, Option<Call>);

impl May {
    fn be(&self, found: &Model) -> bool {
        let May(before, next) = self;
        found == before
            || next
                .as_ref()
                .is_some_and(|call| call.leads_to(before, found))
    }
}

impl Call {
    /// A write that is not acknowledged may be done in part: what it wrote over, byte by byte, and a beginning of what is new.
    fn leads_to(&self, before: &Model, found: &Model) -> bool {
        let Some((name, at, len)) = &self.write else {
            return found == &self.after;
        };
        let (Some(was), Some(is)) = (before.get(name), found.get(name)) else {
            return false;
        };
        let after = &self.after[name];
        let is_written = |place| (*at..at + len).contains(&place) && is[place] == after[place];
        let is_old = |place| was.get(place) == Some(&is[place]);
        let mut grown = was.len()..is.len();
        (was.len()..=after.len()).contains(&is.len())
            && (0..was.len()).all(|place| is_old(place) || is_written(place))
            && grown.all(|place| is[place] == after[place])
            && found.len() == self.after.len()
            && found
                .iter()
                .all(|(other, bytes)| other == name || self.after.get(other) == Some(bytes))
    }
}

fn shown(path: &Path) -> std::io::Result<Model> {
    let file = |entry: std::io::Result<fs::DirEntry>| {
        let entry = entry?;
        let name = entry.file_name().into_string().unwrap();
        Ok((name, Arc::new(fs::read(entry.path())?)))
    };
    fs::read_dir(path)?.map(file).collect()
}

/// A fork, and what it held after each call.
struct Forked {
    id: String,
    model: Model,
    history: Vec<Call>,
    /// The call that the kill left without an answer.
    pending: Option<Call>,
}

impl Forked {
    fn new(id: String, model: Model) -> Forked {
        let first = Call {
            after: model.clone(),
            write: None,
        };
        Forked {
            id,
            model,
            history: vec![first],
            pending: None,
        }
    }

    /// What it may hold now.
    fn now(&self) -> Vec<May> {
        vec![May(self.model.clone(), self.pending.clone())]
    }

    /// What a version may hold that was made since a moment of the history.
    fn since(&self, from: usize) -> Vec<May> {
        let next = |n: usize| self.history.get(n + 1).or(self.pending.as_ref()).cloned();
        let of = |n: usize| May(self.history[n].after.clone(), next(n));
        (from..self.history.len()).map(of).collect()
    }
}

/// A commit or an end of a fork whose answer was lost.
enum Lost {
    Keep(Vec<May>),
    Commit,
    Abandon,
}

/// One volume with whom works on it, and the head that was acknowledged.
struct Worker {
    volume: String,
    mount: PathBuf,
    random: Random,
    fork: Option<Forked>,
    head: Option<u64>,
    holds: Vec<May>,
    lost: Option<Lost>,
    /// Made any change of its own, so that no two commits hold the same.
    count: u64,
}

impl Worker {
    fn may_hold(&self, found: &Model) -> bool {
        self.holds.iter().any(|may| may.be(found))
    }

    /// Works until the daemon has been killed.
    fn work(&mut self, cli: &Cli, killed: &AtomicBool, done: &[AtomicUsize; 4]) {
        while !killed.load(Ordering::Acquire) && self.lost.is_none() {
            let Some(fork) = &self.fork else {
                let made = cli.call(&["fork", &self.volume, self.mount.to_str().unwrap()]);
                if !made.status.success() {
                    return;
                }
                // A fork that was made and never shown is abandoned when its daemon is back.
                let Ok(model) = shown(&self.mount) else {
                    return;
                };
                assert!(
                    self.head.is_none() || self.may_hold(&model),
                    "{}@{:?} holds something else: {}",
                    self.volume,
                    self.head,
                    difference(&self.holds, &model)
                );
                self.fork = Some(Forked::new(text(&made), model));
                done[0].fetch_add(1, Ordering::Relaxed);
                continue;
            };
            let id = fork.id.clone();
            match self.random.below(10) {
                0..=4 if !self.write_some() => return,
                0..=4 => {}
                5..=7 if !self.keep(cli, &id, killed) => return,
                5..=7 => drop(done[1].fetch_add(1, Ordering::Relaxed)),
                8 => {
                    let dense = self.random.below(3) == 0;
                    if !self.change("count")
                        || !self.write_some()
                        || (dense && !(self.change("dense") && self.change("dense")))
                    {
                        return;
                    }
                    let output = cli.call(&["commit", &id]);
                    let Some(number) = number(&output) else {
                        self.lost = Some(Lost::Commit);
                        return;
                    };
                    let fork = self.fork.take().unwrap();
                    self.head = Some(number);
                    self.holds = fork.now();
                    done[2].fetch_add(1, Ordering::Relaxed);
                }
                _ => {
                    if !cli.call(&["abandon", &id]).status.success() {
                        self.lost = Some(Lost::Abandon);
                        return;
                    }
                    self.fork = None;
                    done[3].fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }

    /// Commits with `--keep` while the requests go on; false if the daemon is gone.
    fn keep(&mut self, cli: &Cli, id: &str, killed: &AtomicBool) -> bool {
        if !self.change("count") {
            return false;
        }
        let from = self.fork.as_ref().unwrap().history.len() - 1;
        let (output, alive) = std::thread::scope(|scope| {
            let commit = scope.spawn(|| cli.call(&["commit", id, "--keep"]));
            let mut alive = true;
            while alive && !commit.is_finished() && !killed.load(Ordering::Acquire) {
                alive = self.write_some();
            }
            (commit.join().unwrap(), alive)
        });
        let fork = self.fork.as_ref().unwrap();
        let holds = fork.since(from);
        if let Some(number) = number(&output) {
            (self.head, self.holds) = (Some(number), holds);
        } else {
            self.lost = Some(Lost::Keep(holds));
        }
        alive && self.lost.is_none()
    }

    fn write_some(&mut self) -> bool {
        (0..=self.random.below(12)).all(|_| {
            let name = format!("f{}", self.random.below(6));
            self.change(&name)
        })
    }

    /// Asks for one change of a file; false if it was not answered.
    fn change(&mut self, name: &str) -> bool {
        let fork = self.fork.as_mut().unwrap();
        let random = &mut self.random;
        let path = self.mount.join(name);
        let mut next = fork.model.clone();
        let open = || fs::File::options().write(true).open(&path);
        let mut write = None;
        let result = match next.get_mut(name) {
            None => {
                next.insert(name.into(), Arc::default());
                fs::File::create_new(&path).map(drop)
            }
            Some(bytes) if name == "count" => {
                self.count += 1;
                *bytes = Arc::new(self.count.to_le_bytes().to_vec());
                open().and_then(|file| file.write_all_at(&self.count.to_le_bytes(), 0))
            }
            Some(bytes) if name == "dense" => {
                let mut data = vec![0; DENSE];
                data.fill_with(|| random.below(256) as u8);
                write = Some((name.into(), 0, DENSE));
                *bytes = Arc::new(data);
                open().and_then(|file| file.write_all_at(bytes, 0))
            }
            Some(bytes) => match random.below(9) {
                0..=3 => {
                    let at = random.below(bytes.len() as u64 + 5_000) as usize;
                    let len = 1 + random.below(LARGEST) as usize;
                    let mut data = vec![random.below(256) as u8; len];
                    data[len / 2] = data[0].wrapping_add(1);
                    write = Some((name.into(), at, len));
                    let bytes = Arc::make_mut(bytes);
                    bytes.resize(bytes.len().max(at + len), 0);
                    bytes[at..at + len].copy_from_slice(&data);
                    open().and_then(|file| file.write_all_at(&data, at as u64))
                }
                4 => {
                    let line = format!("line {}\n", random.below(1 << 40));
                    write = Some((name.into(), bytes.len(), line.len()));
                    let bytes = Arc::make_mut(bytes);
                    bytes.extend_from_slice(line.as_bytes());
                    let file = fs::File::options().append(true).open(&path);
                    file.and_then(|mut file| file.write_all(line.as_bytes()))
                }
                5 | 6 => {
                    let len = random.below(LARGEST);
                    Arc::make_mut(bytes).resize(len as usize, 0);
                    open().and_then(|file| file.set_len(len))
                }
                7 => {
                    let to = format!("f{}", random.below(6));
                    let bytes = next.remove(name).unwrap();
                    next.insert(to.clone(), bytes);
                    fs::rename(&path, self.mount.join(to))
                }
                _ => {
                    next.remove(name);
                    fs::remove_file(&path)
                }
            },
        };
        let call = Call { after: next, write };
        match result {
            Ok(()) => {
                fork.model = call.after.clone();
                fork.history.push(call);
                true
            }
            Err(error) => {
                // However the call ended, it may only have failed because nobody serves the mount any more.
                let begun = Instant::now();
                while rustix::fs::statvfs(&self.mount).is_ok() {
                    let alive = begun.elapsed() > Duration::from_secs(2);
                    assert!(
                        !alive,
                        "{}: {name}: {error}, and the daemon lives",
                        self.volume
                    );
                }
                fork.pending = Some(call);
                false
            }
        }
    }

    /// Compares what a new daemon shows with what was acknowledged, and goes on from what it is.
    fn examine(&mut self, cli: &Cli, round: usize) {
        let forks = cli.json(&["forks"]);
        let forks = forks["forks"].as_array().unwrap().iter();
        let mine: Vec<(String, String)> = forks
            .filter(|fork| fork["volume"] == self.volume.as_str())
            .map(|fork| {
                let text = |key: &str| fork[key].as_str().unwrap().to_owned();
                (text("id"), text("state"))
            })
            .collect();
        let head = cli.call(&["volume", "show", &self.volume, "--json"]);
        let head = serde_json::from_slice::<serde_json::Value>(&head.stdout)
            .ok()
            .and_then(|shown| shown["volume"]["head"].as_u64());
        let moved = head != self.head;
        let at = format!("round {round}, {}", self.volume);
        let known = self.fork.as_ref().map(|fork| fork.id.clone());
        let is_there = known.is_some() && mine.iter().any(|(id, _)| Some(id) == known.as_ref());
        let lost = self.lost.take();
        if moved {
            assert_eq!(head, Some(self.head.unwrap_or(0) + 1), "{at}");
            let fork = self.fork.as_ref().unwrap();
            self.holds = match &lost {
                Some(Lost::Keep(holds)) => holds.clone(),
                Some(Lost::Commit) => fork.now(),
                _ => panic!("{at}: the head moved from {:?} to {head:?}", self.head),
            };
            self.head = head;
        }
        match lost {
            Some(Lost::Commit) => assert_eq!(is_there, !moved, "{at}: its fork"),
            Some(Lost::Abandon) => {}
            _ => assert_eq!(is_there, known.is_some(), "{at}: its fork"),
        }
        if head.is_some() {
            let look = cli.path("look");
            let id = cli.ok(&["fork", &self.volume, look.to_str().unwrap(), "--read-only"]);
            let found = shown(&look).unwrap();
            cli.ok(&["abandon", &id]);
            assert!(
                self.may_hold(&found),
                "{at}: the head holds something else: {}",
                difference(&self.holds, &found)
            );
            self.holds = vec![May(found, None)];
        }
        // The answer to the making of a fork may have been lost, too.
        for (id, _) in mine.iter().filter(|(id, _)| Some(id) != known.as_ref()) {
            cli.ok(&["abandon", id]);
        }
        if !is_there {
            // Who lost the daemon on the way to the end could not take the mount away, or there is none.
            mount::detach_abort(&self.mount).unwrap_or_default();
            self.fork = None;
            return;
        }
        let fork = self.fork.as_mut().unwrap();
        let state = mine.iter().find(|(id, _)| *id == fork.id);
        if state.is_some_and(|(_, state)| state == "unmounted") {
            cli.ok(&["mount", &fork.id]);
        }
        let model = shown(&self.mount).unwrap();
        assert!(
            fork.now().iter().any(|may| may.be(&model)),
            "{at}: fork {} shows something else than was acknowledged: {}",
            fork.id,
            difference(&fork.now(), &model)
        );
        *fork = Forked::new(fork.id.clone(), model);
    }
}

/// Where what was found is not the last state that was acknowledged, and the call without an answer, for who has to find out.
fn difference(may: &[May], found: &Model) -> String {
    let May(before, pending) = may.last().expect("something was acknowledged");
    let sizes = |model: &Model| -> Vec<(String, usize)> {
        let size = |(name, bytes): (&String, &Arc<Vec<u8>>)| (name.clone(), bytes.len());
        model.iter().map(size).collect()
    };
    let bytes = |(name, was): (&String, &Arc<Vec<u8>>)| {
        let is = found.get(name)?;
        let differ: Vec<usize> = (0..was.len().min(is.len()))
            .filter(|at| was[*at] != is[*at])
            .collect();
        let (first, last) = (*differ.first()?, *differ.last()?);
        Some(format!("{name} differs in {first}..={last}"))
    };
    let differences: Vec<String> = before.iter().filter_map(bytes).collect();
    let write = pending
        .as_ref()
        .map(|call| (&call.write, sizes(&call.after)));
    format!(
        "{differences:?}, {:?} for {:?}; without an answer: {write:?}",
        sizes(found),
        sizes(before)
    )
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// The number of the version that a commit printed, if it was answered.
fn number(output: &Output) -> Option<u64> {
    let printed = text(output);
    let number = || printed.rsplit('@').next()?.parse().ok();
    output
        .status
        .success()
        .then(|| number().expect("a version"))
}

/// > | `write(2)` returned, or any other change | kept: it is in the fork's log and spool | gone with the fork |
/// > | `forkvol commit` returned | kept | kept: the version and the head are on disk |
/// > | `forkvol commit` was interrupted | the head is the old or the new version, never anything else | the same |
#[test]
fn a_daemon_that_is_killed_at_any_moment_has_lost_nothing_that_it_acknowledged() {
    let kills = std::env::var("FORKVOL_KILLS").map_or(KILLS, |kills| kills.parse().unwrap());
    let seed = std::env::var("FORKVOL_SEED")
        .map_or(u64::from(std::process::id()), |seed| seed.parse().unwrap());
    println!("{kills} kills, FORKVOL_SEED={seed}");
    let cli = Cli::new();
    let mut random = Random(seed * 2_654_435_761 + 1);
    let mut workers: Vec<Worker> = (0..WORKERS)
        .map(|n| Worker {
            volume: format!("v{n}"),
            mount: cli.path(&format!("m{n}")),
            random: Random(seed * 7_919 + n as u64 + 1),
            fork: None,
            head: None,
            holds: Vec::new(),
            lost: None,
            count: 0,
        })
        .collect();
    let done: [AtomicUsize; 4] = Default::default();
    for round in 0..kills {
        cli.ok(&["volumes"]);
        let pid = cli.daemon_pid();
        let killed = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for worker in &mut workers {
                let (cli, killed, done) = (&cli, &killed, &done);
                scope.spawn(move || worker.work(cli, killed, done));
            }
            if random.below(3) == 0 {
                // It may be cut off, too.
                scope.spawn(|| cli.call(&["gc"]));
            }
            std::thread::sleep(Duration::from_millis(5 + random.below(500)));
            killed.store(true, Ordering::Release);
            cli.kill(pid);
        });
        for worker in &mut workers {
            worker.examine(&cli, round);
        }
        cli.check();
    }
    let [forks, keeps, commits, abandons] = done.map(AtomicUsize::into_inner);
    println!("{kills} kills: {forks} forks, {keeps} keeps, {commits} commits, {abandons} abandons");
    assert!(keeps > 0 && forks >= kills, "the load is none");
}

/// > Of a `write(2)` that was cut off, by a killed daemon or the end of the mount, a part may be there: a beginning of what is new in
/// > the file, and any of what it wrote over.
#[test]
fn a_long_write_that_a_kill_cuts_off_leaves_a_prefix_of_it() {
    let cli = Cli::new();
    let mount = cli.path("m");
    let fork = cli.ok(&["fork", "v", mount.to_str().unwrap()]);
    let spool = cli.path("store/forks").join(&fork).join("spool");
    let bytes: Vec<u8> = (0..48_u32 << 20).flat_map(u32::to_le_bytes).collect();
    for round in 0.. {
        let path = mount.join(format!("f{round}"));
        let pid = cli.daemon_pid();
        let mut file = fs::File::create(&path).unwrap();
        let before = fs::metadata(&spool).unwrap().len();
        let returned = std::thread::scope(|scope| {
            let writer = scope.spawn(|| std::io::Write::write(&mut file, &bytes));
            while fs::metadata(&spool).unwrap().len() <= before + (8 << 20) && !writer.is_finished()
            {
                std::thread::yield_now();
            }
            cli.kill(pid);
            writer.join().unwrap()
        });
        cli.ok(&["mount", &fork]);
        let found = fs::read(&path).unwrap();
        assert!(bytes.starts_with(&found), "{} bytes", found.len());
        assert!(
            found.len() >= returned.unwrap_or(0),
            "what was acknowledged is there"
        );
        // The kill may have come late: then all of it is there.
        if found.len() < bytes.len() {
            assert!(found.len() >= 1 << 20);
            break;
        }
    }
    cli.check();
}

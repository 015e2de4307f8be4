use std::collections::BTreeMap;
use std::time::Instant;

use super::*;
use crate::fork::Excludes;
use crate::fork::error::FsError;
use crate::fork::log::Request;
use crate::fs::{Caller, Fs, NewNode, RenameMode, SetAttr, XattrMode};
use crate::record::{Ino, Kind, ROOT};
use crate::store::{Verdict, VersionRef};

mod archive;
mod beside;
mod content;
mod crashes;
mod exclude;
mod faults;
mod full;
mod heads;
mod meanwhile;
mod model;
mod power;
mod private_root;
mod replay;
mod retention;
mod settling;
mod spools;
mod versions;

const ME: Caller = Caller {
    uid: 0,
    gid: 0,
    request: Request {
        epoch: 0,
        unique: 0,
    },
};

struct Bench {
    dir: tempfile::TempDir,
    engine: Option<Arc<Engine>>,
    table: u64,
    retention: Policy,
    /// Where in `dir` the store lies.
    place: String,
    threads: usize,
    bulk: u64,
}

/// So little that many a test's commit keeps the spool of its fork.
const LITTLE: u64 = 64 << 10;

impl Bench {
    fn new() -> Bench {
        Bench::with_table(EngineConfig::default().table)
    }

    /// One where commits copy everything, and keep no spool.
    fn copying() -> Bench {
        let mut bench = Bench::new();
        bench.bulk = u64::MAX;
        bench.reopen();
        bench
    }

    fn with_table(table: u64) -> Bench {
        let mut bench = Bench {
            dir: tempfile::tempdir().unwrap(),
            engine: None,
            table,
            // What the disk of the tests has free is not theirs.
            retention: Policy::new(None, Some(0)),
            place: "store".into(),
            threads: EngineConfig::default().threads,
            bulk: LITTLE,
        };
        bench.reopen();
        bench
    }

    fn engine(&self) -> &Arc<Engine> {
        self.engine.as_ref().unwrap()
    }

    /// What a new daemon does after the old one was killed: nothing is flushed or ended in between.
    fn reopen(&mut self) {
        self.close();
        let config = EngineConfig {
            reserve: Some(0),
            table: self.table,
            retention: self.retention.clone(),
            threads: self.threads,
            bulk: self.bulk,
            ..EngineConfig::default()
        };
        self.engine = Some(Engine::open(&self.path(), config).unwrap());
    }

    fn path(&self) -> std::path::PathBuf {
        self.dir.path().join(&self.place)
    }

    /// Lets go of the engine without a word.
    fn close(&mut self) {
        if let Some(engine) = self.engine.take() {
            engine.drain();
            for thread in std::mem::take(&mut *engine.upkeep.lock()) {
                thread.thread().unpark();
                thread.join().unwrap();
            }
        }
    }

    fn fork(&self, volume: &str) -> ForkId {
        self.fork_sized(volume, 1 << 30)
    }

    fn fork_sized(&self, volume: &str, size: u64) -> ForkId {
        self.fork_with(volume, |request| request.size = size)
    }

    fn fork_with(&self, volume: &str, change: impl FnOnce(&mut ForkRequest)) -> ForkId {
        let mut request = fork_request(volume);
        change(&mut request);
        self.engine().fork(request).unwrap().id.parse().unwrap()
    }

    fn fs(&self, id: ForkId) -> Fs {
        self.engine().fs_of(id).unwrap()
    }

    fn commit(&self, id: ForkId, keep: bool) -> Option<u64> {
        let mut done = self.engine().commit(vec![id], request(keep)).unwrap();
        done.remove(0).version.map(|version| version.number)
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if let Some(engine) = self.engine.take() {
            let ended = engine.shutdown(true);
            // What fails a test must not be hidden by what it leaves behind.
            assert!(ended.is_ok() || std::thread::panicking(), "{ended:?}");
        }
    }
}

fn fork_request(volume: &str) -> ForkRequest {
    ForkRequest {
        volume: volume.into(),
        from: None,
        parents: Vec::new(),
        read_only: false,
        ephemeral: false,
        size: 1 << 30,
        labels: BTreeMap::new(),
        excludes: Vec::new(),
        default_excludes: false,
        import: false,
        owner: Owner::Keep,
        acl: false,
        suid: false,
        dev: false,
        job: None,
        uid_map: None,
        verdict: Verdict::Off,
        scope: String::new(),
        uid: 0,
        gid: 0,
        asker: Weak::new(),
    }
}

fn request(keep: bool) -> CommitRequest {
    CommitRequest {
        keep,
        labels: BTreeMap::new(),
        message: None,
        if_head: None,
        if_base: false,
        force: false,
        when: BTreeMap::new(),
    }
}

fn noise(len: usize, mut seed: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(len);
    while out.len() < len {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        out.extend_from_slice(&seed.to_le_bytes());
    }
    out.truncate(len);
    out
}

/// Bytes that compression makes an eighth smaller.
fn codes(len: usize, seed: u64) -> Vec<u8> {
    noise(len, seed).iter().map(|byte| byte & 0x7f).collect()
}

fn put(fs: &Fs, name: &str, bytes: &[u8]) -> Ino {
    let ino = fs
        .make(ME, ROOT, name.as_bytes(), NewNode::new(Kind::File, 0o644))
        .unwrap()
        .ino;
    for (n, part) in bytes.chunks(100_000).enumerate() {
        fs.write(ME, ino, n as u64 * 100_000, part, false).unwrap();
    }
    ino
}

fn get(fs: &Fs, name: &str) -> Option<Vec<u8>> {
    let entry = fs.lookup(ROOT, name.as_bytes()).unwrap()?;
    Some(fs.read(entry.ino, 0, entry.attr.size as usize).unwrap())
}

fn check(bench: &Bench) {
    let report = bench.engine().check().unwrap();
    assert!(report.problems.is_empty(), "{:?}", report.problems);
}

#[test]
fn a_commit_is_what_the_next_fork_starts_from() {
    let bench = Bench::new();
    let a = bench.fork("npm");
    let files = [
        ("empty", 0),
        ("small", 700),
        ("one", 90_000),
        ("large", 1_500_000),
    ];
    for (name, len) in files {
        put(&bench.fs(a), name, &noise(len, 7));
    }
    assert_eq!(bench.commit(a, false), Some(1));
    let fs = bench.fs(bench.fork("npm"));
    for (name, len) in files {
        assert_eq!(get(&fs, name), Some(noise(len, 7)), "{name}");
    }
    check(&bench);
}

/// > A fork shows the version it was made from and its own changes, and nothing of other forks. The last commit wins: its version
/// > is the head, whatever was committed since the fork was made.
#[test]
fn forks_of_one_volume_see_only_their_base_and_themselves_and_the_last_commit_wins() {
    let bench = Bench::new();
    let first = bench.fork("v");
    put(&bench.fs(first), "base", b"base");
    bench.commit(first, false);
    let (a, b) = (bench.fork("v"), bench.fork("v"));
    put(&bench.fs(a), "a", b"a");
    put(&bench.fs(b), "b", b"b");
    assert_eq!(get(&bench.fs(a), "b"), None);
    assert_eq!(get(&bench.fs(b), "a"), None);
    assert_eq!(
        (bench.commit(a, false), bench.commit(b, false)),
        (Some(2), Some(3))
    );
    let fs = bench.fs(bench.fork("v"));
    assert_eq!((get(&fs, "a"), get(&fs, "b")), (None, Some(b"b".to_vec())));
    let log = bench.engine().log("v").unwrap();
    assert_eq!(log[0].base.as_deref(), Some("v@1"));
    assert_eq!(log[0].previous, Some(2));
    check(&bench);
}

/// > | `forkvol abandon` returned | gone | gone; it may be listed once more, as `lost` |
#[test]
fn counters_tell_how_well_forks_fitted_and_what_they_were_refused_for() {
    let mut bench = Bench::new();
    bench.retention.limit = Some(1);
    bench.reopen();
    let labelled = |volume: &str, value: &str| {
        let mut request = fork_request(volume);
        request.labels.insert("lock".into(), value.into());
        request
    };
    let first = bench.engine().fork(labelled("v", "1")).unwrap();
    let first: ForkId = first.id.parse().unwrap();
    put(&bench.fs(first), "f", b"1");
    bench.commit(first, false);
    bench.engine().fork(labelled("v", "1")).unwrap();
    bench.engine().fork(labelled("v", "2")).unwrap();
    let unmounted = bench.fork_with("w", |request| request.parents = vec!["v".into()]);
    bench.engine().abandon(unmounted).unwrap();
    let mut missing = fork_request("v");
    missing.from = Some("v@9".into());
    bench.engine().fork(missing).unwrap_err();
    bench.engine().crowded.store(true, Ordering::Release);
    bench.engine().fork(fork_request("v")).unwrap_err();
    let counters = bench.engine().counters();
    let counted: Vec<_> = counters
        .iter()
        .filter(|(name, _)| name.starts_with("hits_") || name.starts_with("degraded_"))
        .map(|(name, count)| format!("{name} {count}"))
        .collect();
    assert_eq!(
        counted,
        [
            "degraded_damaged 0",
            "degraded_mount 1",
            "degraded_no_space 1",
            "degraded_other 1",
            "degraded_policy 0",
            "hits_empty 1",
            "hits_exact 1",
            "hits_fallback 1",
            "hits_stale 1",
        ]
    );
    assert_eq!(counters["forks"], 4);
    bench.reopen();
    assert_eq!(bench.engine().counters()["forks"], 0);
}

#[test]
fn forks_of_jobs_are_orphans_as_soon_as_nobody_can_come_to_mount_them() {
    let bench = Bench::new();
    let client = Arc::new(());
    let asker = Arc::downgrade(&client);
    let fork = bench.fork_with("v", |request| {
        request.job = Some("1".into());
        request.asker = asker;
    });
    bench.fork("by-hand");
    assert_eq!(bench.engine().orphans(), []);
    drop(client);
    assert_eq!(bench.engine().orphans(), [fork]);
}

#[test]
fn an_abandoned_fork_leaves_the_head_as_it_was() {
    let mut bench = Bench::new();
    let first = bench.fork("v");
    put(&bench.fs(first), "kept", b"1");
    bench.commit(first, false);
    let doomed = bench.fork("v");
    let fs = bench.fs(doomed);
    fs.unlink(ME, ROOT, b"kept").unwrap();
    let mut record = bench.engine().live(doomed).unwrap().record.lock().clone();
    bench.engine().abandon(doomed).unwrap();
    assert!(matches!(fs.getattr(ROOT), Err(FsError::Ended)));
    drop(fs);
    for cut in [false, true] {
        if cut {
            // What was not synced yet is back: the record, of another boot by now.
            record.boot = "before the power cut".into();
            bench.engine().store.put_fork(&record).unwrap();
        }
        bench.reopen();
        let listed = bench.engine().find_fork(&doomed.to_string());
        assert_eq!(listed.ok().map(|fork| fork.state), cut.then_some("lost"));
        assert_eq!(get(&bench.fs(bench.fork("v")), "kept"), Some(b"1".to_vec()));
        assert_eq!(bench.engine().volume("v").unwrap().head, Some(1));
    }
    bench.engine().abandon(doomed).unwrap();
}

/// > What a volume does not have yet is new to it: an untouched fork of a parent makes its first version, and an import makes one
/// > whatever it holds.
#[test]
fn what_a_volume_did_not_have_makes_a_version_though_nothing_was_changed() {
    let bench = Bench::new();
    let first = bench.fork("v");
    put(&bench.fs(first), "f", b"1");
    bench.commit(first, false);
    let of_parent = bench.fork_with("w", |request| request.parents = vec!["v".into()]);
    assert_eq!(bench.commit(of_parent, false), Some(1));
    assert_eq!(bench.commit(bench.fork("w"), false), None);
    let mut tar = Vec::new();
    bench.engine().export("w", &mut tar).unwrap();
    for number in [2, 3] {
        let imported = bench.engine().import("w", &mut &tar[..], (0, 0)).unwrap();
        assert_eq!(imported.version.map(|v| v.number), Some(number));
    }
}

/// > A commit of what has not changed makes no version; the times of a folder alone are no change.
#[test]
fn a_commit_of_an_unchanged_fork_makes_no_version() {
    let bench = Bench::new();
    let first = bench.fork("v");
    put(&bench.fs(first), "f", b"1");
    bench.commit(first, false);
    let idle = bench.fork("v");
    assert_eq!(bench.commit(idle, false), None);
    let undone = bench.fork("v");
    put(&bench.fs(undone), "g", b"1");
    bench.fs(undone).unlink(ME, ROOT, b"g").unwrap();
    assert_eq!(
        bench.commit(undone, false),
        None,
        "the root's times alone are no change"
    );
    let touched = bench.fork("v");
    let fs = bench.fs(touched);
    let dir = private_root::folder(&fs, "dir");
    bench.commit(touched, true);
    let time = SetAttr {
        mtime: Some(5),
        ..SetAttr::default()
    };
    fs.setattr(ME, dir, time).unwrap();
    assert_eq!(bench.commit(touched, true), None, "nor those of another");
    let file = fs.lookup(ROOT, b"f").unwrap().unwrap().ino;
    fs.setattr(ME, file, time).unwrap();
    assert_eq!(bench.commit(touched, false), Some(3), "those of a file are");
    assert_eq!(bench.engine().log("v").unwrap().len(), 3);
}

/// > An unchanged fork that was wanted with labels that its base has not makes a version with them, while that base is the head.
#[test]
fn a_good_job_that_changed_nothing_gives_the_head_the_labels_it_was_wanted_with() {
    let bench = Bench::new();
    let first = bench.fork("v");
    put(&bench.fs(first), "f", b"1");
    bench.commit(first, false);
    let wanted = |value: &'static str| {
        bench.fork_with("v", move |request| {
            request.labels.insert("lock".into(), value.into());
        })
    };
    let late = wanted("3");
    assert_eq!(bench.commit(wanted("2"), true), Some(2));
    let again = wanted("2");
    let hit = &bench.engine().find_fork(&again.to_string()).unwrap().hit;
    assert_eq!(*hit, Hit::Exact);
    assert_eq!(bench.commit(again, false), None, "it has them by now");
    assert_eq!(
        bench.commit(late, false),
        None,
        "the head was made meanwhile"
    );
    let versions = bench.engine().log("v").unwrap();
    assert_eq!((versions.len(), versions[0].new_bytes), (2, 0));
    assert_eq!(get(&bench.fs(bench.fork("v")), "f"), Some(b"1".to_vec()));
}

/// > A commit is of one point in time. With `--keep` the fork goes on, from the version it has made.
#[test]
fn keep_commits_a_point_in_time_and_the_fork_goes_on_from_it() {
    let mut bench = Bench::new();
    let id = bench.fork("v");
    let fs = bench.fs(id);
    let ino = put(&fs, "f", &noise(300_000, 1));
    put(&fs, "gone", b"x");
    assert_eq!(bench.commit(id, true), Some(1));
    fs.write(ME, ino, 100_000, &[7; 5000], false).unwrap();
    fs.unlink(ME, ROOT, b"gone").unwrap();
    assert_eq!(bench.commit(id, true), Some(2));
    fs.write(ME, ino, 200_000, &[8; 10], false).unwrap();
    let mut now = noise(300_000, 1);
    now[100_000..105_000].fill(7);
    let second = now.clone();
    now[200_000..200_010].fill(8);
    assert_eq!(get(&fs, "f"), Some(now.clone()));
    drop(fs);
    bench.reopen();
    assert_eq!(get(&bench.fs(id), "f"), Some(now), "after a restart");
    let read = |number: u32| {
        let mut out = Vec::new();
        bench
            .engine()
            .cat(&format!("v@{number}"), b"f", &mut out)
            .unwrap();
        out
    };
    assert_eq!((read(1), read(2)), (noise(300_000, 1), second));
    assert_eq!(bench.engine().ls("v@2", b"/").unwrap().len(), 1);
    check(&bench);
}

/// > | `write(2)` returned, or any other change | kept: it is in the fork's log and spool | gone with the fork |
#[test]
fn everything_that_was_acknowledged_is_there_after_the_daemon_was_killed() {
    let mut bench = Bench::new();
    let first = bench.fork("v");
    put(&bench.fs(first), "base", &noise(200_000, 3));
    bench.commit(first, false);
    let id = bench.fork("v");
    let fs = bench.fs(id);
    let base = fs.lookup(ROOT, b"base").unwrap().unwrap().ino;
    fs.write(ME, base, 5_000, b"patched", false).unwrap();
    let dir = fs
        .make(ME, ROOT, b"dir", NewNode::new(Kind::Directory, 0o755))
        .unwrap()
        .ino;
    let file = fs
        .make(ME, dir, b"file", NewNode::new(Kind::File, 0o600))
        .unwrap()
        .ino;
    fs.write(ME, file, 10, b"hello", false).unwrap();
    fs.link(ME, file, ROOT, b"other").unwrap();
    fs.rename(ME, (dir, b"file"), (ROOT, b"moved"), RenameMode::Replace)
        .unwrap();
    fs.setxattr(ME, file, b"user.k", b"v", XattrMode::Any)
        .unwrap();
    fs.setattr(
        ME,
        file,
        SetAttr {
            mode: Some(0o711),
            mtime: Some(5),
            ..SetAttr::default()
        },
    )
    .unwrap();
    let before = (fs.getattr(file).unwrap(), get(&fs, "base"));
    drop(fs);
    bench.reopen();
    let fs = bench.fs(id);
    assert_eq!((fs.getattr(file).unwrap(), get(&fs, "base")), before);
    assert_eq!(
        get(&fs, "moved"),
        Some(b"\0\0\0\0\0\0\0\0\0\0hello".to_vec())
    );
    assert_eq!(fs.getxattr(file, b"user.k").unwrap(), b"v");
    drop(fs);
    assert_eq!(bench.commit(id, false), Some(2));
    let fs = bench.fs(bench.fork("v"));
    assert_eq!((fs.getattr(file).unwrap(), get(&fs, "base")), before);
    check(&bench);
}

#[test]
fn changing_little_of_a_large_committed_file_stores_little() {
    let bench = Bench::new();
    let first = bench.fork("v");
    let mut bytes = noise(8 << 20, 9);
    put(&bench.fs(first), "big", &bytes);
    bench.commit(first, false);
    let id = bench.fork("v");
    let fs = bench.fs(id);
    let ino = fs.lookup(ROOT, b"big").unwrap().unwrap().ino;
    fs.write(ME, ino, 3_000_001, &[5; 4096], false).unwrap();
    bytes[3_000_001..3_004_097].fill(5);
    assert!(bench.engine().find_fork(&id.to_string()).unwrap().bytes <= 8192);
    bench.commit(id, false);
    let newest = &bench.engine().log("v").unwrap()[0];
    assert!(
        newest.new_bytes < 700_000,
        "{} bytes for 4 KiB",
        newest.new_bytes
    );
    let fs = bench.fs(bench.fork("v"));
    assert_eq!(get(&fs, "big").unwrap(), bytes);
    // The same bytes give the same tree, however they came to be.
    let other = bench.fork("w");
    put(&bench.fs(other), "big", &bytes);
    bench.commit(other, false);
    assert_eq!(bench.engine().log("w").unwrap()[0].new_bytes / 10_000, 0);
    check(&bench);
}

/// > | new data of a fork | its `--size` | ENOSPC; reading, deleting and commit go on |
#[test]
fn beyond_its_size_a_fork_answers_no_space_and_nothing_else_breaks() {
    let bench = Bench::new();
    let id = bench.fork_sized("v", 1 << 20);
    let fs = bench.fs(id);
    let ino = put(&fs, "a", &vec![1; 900_000]);
    // Up to the end of the page that is there.
    let rest = vec![1; 300_000];
    assert_eq!(fs.write(ME, ino, 900_000, &rest, false).unwrap(), 1120);
    assert!(matches!(
        fs.write(ME, ino, 901_120, &rest, false),
        Err(FsError::NoSpace)
    ));
    assert_eq!(get(&fs, "a"), Some(vec![1; 901_120]));
    fs.unlink(ME, ROOT, b"a").unwrap();
    fs.forget(ino, 10);
    put(&fs, "b", &vec![2; 900_000]);
    assert_eq!(bench.commit(id, false), Some(1));
    assert_eq!(get(&bench.fs(bench.fork("v")), "b"), Some(vec![2; 900_000]));
}

/// > Files that were unlinked while open stay usable until they are closed, and are never committed.
#[test]
fn an_open_file_without_names_lives_until_it_is_forgotten_and_is_never_committed() {
    let bench = Bench::new();
    let first = bench.fork("v");
    put(&bench.fs(first), "f", &noise(50_000, 2));
    bench.commit(first, false);
    let id = bench.fork("v");
    let fs = bench.fs(id);
    let ino = fs.lookup(ROOT, b"f").unwrap().unwrap().ino;
    fs.unlink(ME, ROOT, b"f").unwrap();
    fs.write(ME, ino, 50_000, b"more", false).unwrap();
    assert_eq!(bench.commit(id, true), Some(2));
    let bytes = [noise(50_000, 2), b"more".to_vec()].concat();
    assert_eq!(
        fs.read(ino, 0, 60_000).unwrap(),
        bytes,
        "after a commit with keep"
    );
    assert!(bench.engine().ls("v", b"/").unwrap().is_empty());
    fs.forget(ino, 1);
    assert!(matches!(fs.getattr(ino), Err(FsError::Stale)));
    check(&bench);
}

#[test]
fn gc_frees_what_nothing_names_and_leaves_every_version_whole() {
    let bench = Bench::new();
    for volume in ["keep", "drop"] {
        let id = bench.fork(volume);
        put(
            &bench.fs(id),
            "f",
            &noise(20 << 20, volume.len() as u64 + u64::from(volume == "drop")),
        );
        bench.commit(id, false);
    }
    bench.engine().store.flush().unwrap();
    let live = bench.fork("keep");
    put(&bench.fs(live), "mine", &noise(100_000, 77));
    bench.engine().remove_volume("drop", false).unwrap();
    let dry = bench.engine().gc(true).unwrap();
    let report = bench.engine().gc(false).unwrap();
    assert_eq!(dry.garbage.removed_chunks, report.garbage.removed_chunks);
    assert!(report.garbage.freed_bytes > 15 << 20, "{report:?}");
    assert_eq!(get(&bench.fs(live), "f").map(|f| f.len()), Some(20 << 20));
    assert_eq!(bench.commit(live, false), Some(2));
    check(&bench);
}

/// > | `write(2)` returned, or any other change | kept: it is in the fork's log and spool | gone with the fork |
/// > | `fsync(2)` returned | kept | gone with the fork |
/// > | `forkvol abandon` returned | gone | gone; it may be listed once more, as `lost` |
/// > A fork does not outlive a reboot: it is then `lost`, and can only be abandoned. Versions outlive it.
#[test]
fn a_fork_of_another_boot_is_lost_and_can_only_be_abandoned() {
    let mut bench = Bench::new();
    let first = bench.fork("v");
    put(&bench.fs(first), "committed", &noise(100_000, 1));
    bench.commit(first, false);
    let id = bench.fork("v");
    put(&bench.fs(id), "of the fork alone", b"1");
    let live = bench.engine().live(id).unwrap();
    live.record.lock().boot = "another".into();
    bench.engine().store.put_fork(&live.record.lock()).unwrap();
    drop(live);
    bench.reopen();
    assert_eq!(
        bench.engine().find_fork(&id.to_string()).unwrap().state,
        "lost"
    );
    assert_eq!(
        bench
            .engine()
            .commit(vec![id], request(false))
            .unwrap_err()
            .code,
        Code::Failed
    );
    assert!(bench.engine().fs_of(id).is_err());
    bench.engine().abandon(id).unwrap();
    assert!(bench.engine().forks().unwrap().is_empty());
    let fs = bench.fs(bench.fork("v"));
    assert_eq!(get(&fs, "committed"), Some(noise(100_000, 1)));
    assert_eq!(get(&fs, "of the fork alone"), None);
}

#[test]
fn df_counts_what_the_fork_shows_and_deleting_lowers_it() {
    let mut bench = Bench::new();
    let first = bench.fork("v");
    put(&bench.fs(first), "base", &noise(400_000, 1));
    bench.commit(first, false);
    let fork = bench.fork("v");
    let used = |bench: &Bench| {
        let now = bench.fs(fork).statfs();
        (now.blocks - now.free, now.files - now.files_free)
    };
    let pages = 400_000_u64.div_ceil(4096);
    assert_eq!(used(&bench), (pages, 2));
    let own = put(&bench.fs(fork), "own", &noise(8_192, 2));
    assert_eq!(used(&bench), (pages + 2, 3));
    bench.commit(fork, true);
    assert_eq!(used(&bench), (pages + 2, 3));
    bench.fs(fork).unlink(ME, ROOT, b"base").unwrap();
    assert_eq!(used(&bench), (2, 2));
    bench.fs(fork).unlink(ME, ROOT, b"own").unwrap();
    assert_eq!(used(&bench), (2, 2), "the kernel knows it still");
    bench.fs(fork).forget(own, 1);
    assert_eq!(used(&bench), (0, 1));
    bench.reopen();
    assert_eq!(used(&bench), (0, 1));
}

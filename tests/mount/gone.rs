//! Mounts that go, or are used elsewhere, without a word to the daemon: that is no commit, loses nothing, and keeps no commit
//! from being whole.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use crate::common::{Random, TestMount, TestStore, sh};

/// A shell in a mount namespace of its own, which does one line after the other.
struct Elsewhere {
    child: Child,
    lines: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Elsewhere {
    fn new(dir: &Path) -> Elsewhere {
        let serve = "while read -r line; do eval \"$line\" >out 2>&1; echo $?; done";
        let mut child = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "bash", "-c", serve])
            .current_dir(dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (lines, answers) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        Elsewhere {
            child,
            lines,
            answers: BufReader::new(answers),
        }
    }

    /// Whether a line did well.
    fn can(&mut self, line: &str) -> bool {
        writeln!(self.lines, "{line}").unwrap();
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        answer.trim().parse::<u32>().unwrap() == 0
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        self.child.kill().unwrap_or_default();
        self.child.wait().unwrap();
    }
}

/// Ends a connection as an administrator does, in the kernel's folder of connections.
fn abort(mount: &TestMount) {
    // The minor number of a device without a disk.
    let device = fs::metadata(&mount.path).unwrap().dev();
    let minor = (device & 0xff) | ((device >> 12) & !0xff);
    let dir = tempfile::tempdir().unwrap();
    let mut elsewhere = Elsewhere::new(dir.path());
    assert!(elsewhere.can("mkdir c && mount -t fusectl none c"));
    assert!(elsewhere.can(&format!("echo 1 >c/{minor}/abort")));
}

fn detach(mount: &TestMount) {
    sh(
        Path::new("/"),
        &format!("umount -l '{}'", mount.path.display()),
    );
}

fn force(mount: &TestMount) {
    sh(
        Path::new("/"),
        &format!("umount -f '{}'", mount.path.display()),
    );
}

type Ending = fn(&TestMount);

/// Writes until it cannot; returns how many files were acknowledged, each holding its number many times over.
fn write_on(path: &Path) -> u32 {
    for n in 0.. {
        let text = n.to_string().repeat(3_000);
        if fs::write(path.join(format!("n{n}")), text).is_err() {
            return n;
        }
    }
    unreachable!("there are more numbers than files")
}

fn assert_all_there(path: &Path, acknowledged: u32) {
    for n in 0..acknowledged {
        let text = fs::read_to_string(path.join(format!("n{n}"))).unwrap();
        assert!(
            text == n.to_string().repeat(3_000),
            "n{n} of {acknowledged}"
        );
    }
}

/// > An unmount is not a commit.
#[test]
fn a_mount_that_goes_commits_nothing_and_its_fork_shows_everything_when_it_is_mounted_again() {
    let store = TestStore::new();
    let ways: [(&str, Ending); 3] = [("detach", detach), ("force", force), ("abort", abort)];
    for (way, go) in ways {
        let base = store.fork(way);
        fs::write(base.path.join("base"), "base").unwrap();
        assert_eq!(store.commit(base), Some(1));
        let mount = store.fork(way);
        let id = mount.id;
        fs::remove_file(mount.path.join("base")).unwrap();
        for n in 0..50 {
            let text = n.to_string().repeat(3_000);
            fs::write(mount.path.join(format!("n{n}")), text).unwrap();
        }
        go(&mount);
        store.wait_unmounted(id);
        assert_eq!(store.engine.volume(way).unwrap().head, Some(1), "{way}");
        drop(mount);
        let again = store.mount(id);
        assert_all_there(&again.path, 50);
        assert_eq!(fs::read_dir(&again.path).unwrap().count(), 50, "{way}");
        assert_eq!(store.commit(again), Some(2), "{way}");
        let next = store.fork(way);
        assert_all_there(&next.path, 50);
    }
    store.check();
}

#[test]
fn a_connection_that_is_aborted_amid_writes_loses_none_that_was_acknowledged() {
    let store = TestStore::new();
    for round in 0..5 {
        let mount = store.fork("v");
        let id = mount.id;
        let head = store.engine.volume("v").unwrap().head;
        let path = mount.path.clone();
        let writer = std::thread::spawn(move || write_on(&path));
        std::thread::sleep(std::time::Duration::from_millis(20 + 37 * round));
        abort(&mount);
        let acknowledged = writer.join().unwrap();
        assert!(acknowledged > 0);
        store.wait_unmounted(id);
        assert_eq!(store.engine.volume("v").unwrap().head, head);
        drop(mount);
        let again = store.mount(id);
        assert_all_there(&again.path, acknowledged);
        store.commit(again).unwrap();
        assert_all_there(&store.fork("v").path, acknowledged);
    }
    store.check();
}

#[test]
fn requests_of_an_older_mount_reach_the_fork_as_long_as_that_lives_and_never_after_a_new_one() {
    let store = TestStore::new();
    let older = store.fork("v");
    let id = older.id;
    fs::write(older.path.join("f"), "first ").unwrap();
    let mut held = File::options()
        .append(true)
        .open(older.path.join("f"))
        .unwrap();
    let folder = File::open(&older.path).unwrap();
    // Out of sight and still in use: it goes on, and nobody else may serve the fork.
    detach(&older);
    held.write_all(b"second").unwrap();
    let refused = store.try_mount_folder(id, "").err().unwrap();
    assert!(refused.contains("is mounted already"), "{refused}");
    assert_eq!(
        store.engine.find_fork(&id.to_string()).unwrap().state,
        "live"
    );
    drop((held, folder));
    store.wait_unmounted(id);
    assert_eq!(store.engine.volume("v").unwrap().head, None);

    let older = store.mount(id);
    let held = File::options()
        .write(true)
        .open(older.path.join("f"))
        .unwrap();
    let folder = File::open(&older.path).unwrap();
    abort(&older);
    store.wait_unmounted(id);
    let newer = store.mount(id);
    assert_eq!(
        fs::read_to_string(newer.path.join("f")).unwrap(),
        "first second"
    );
    for _ in 0..3 {
        assert!(held.write_all_at(b"late", 0).is_err());
        assert!(held.set_len(1).is_err());
        assert!(fs::write(older.path.join("g"), "late").is_err());
        assert!(rustix::fs::unlinkat(&folder, "f", rustix::fs::AtFlags::empty()).is_err());
        fs::write(newer.path.join("h"), "new").unwrap();
    }
    drop(older);
    assert!(held.write_all_at(b"late", 0).is_err());
    assert_eq!(store.commit(newer), Some(1));
    assert!(held.write_all_at(b"late", 0).is_err());
    let next = store.fork("v");
    assert_eq!(sh(&next.path, "ls; cat f h"), "f\nh\nfirst secondnew");
    store.check();
}

/// > Where an unmounted fork is still held out of sight, as by a container, `forkvol mount` ends that mount: whoever uses it gets
/// > EIO.
#[test]
fn a_mount_that_lives_on_out_of_sight_ends_with_a_new_one_of_its_fork_and_answers_nothing_any_more()
{
    let store = TestStore::new();
    let base = store.fork("v");
    sh(&base.path, "mkdir d; head -c 300000 /dev/zero >d/base");
    assert_eq!(store.commit(base), Some(1));
    let older = store.fork("v");
    let id = older.id;
    let dir = tempfile::tempdir().unwrap();
    let mut elsewhere = Elsewhere::new(dir.path());
    let at = older.path.display();
    assert!(elsewhere.can(&format!("mkdir bind; mount --bind '{at}' bind")));
    assert!(elsewhere.can("cd bind; echo 1 >d/small; cat d/*; ls -lR; exec 7<d/base 8>>d/small"));
    assert!(elsewhere.can("echo gone >d/gone; exec 9<>d/gone; rm d/gone; cd .."));
    let folder = File::open(&older.path).unwrap();
    detach(&older);
    assert!(elsewhere.can("echo 2 >&8; cat bind/d/base"));
    let path = Path::new("/proc/self/fd").join(folder.as_raw_fd().to_string());
    let writer = std::thread::spawn(move || write_on(&path));
    while store.engine.find_fork(&id.to_string()).unwrap().changed < 100 {
        std::thread::yield_now();
    }

    let newer = store.mount_instead(id);
    let acknowledged = writer.join().unwrap();
    assert!(acknowledged > 0);
    for asked in [
        "ls bind",
        "cat bind/d/small",
        "cat bind/d/base",
        "stat bind/d",
        "cat <&7",
        "cat <&9",
        "echo 3 >&8",
        "echo 3 >&9",
        "rm bind/d/small",
        "mkdir bind/e",
    ] {
        assert!(!elsewhere.can(asked), "{asked}");
        fs::write(newer.path.join("asked"), asked).unwrap();
    }
    assert_all_there(&newer.path, acknowledged);
    assert_eq!(
        sh(&newer.path, "cat d/small; wc -c <d/base; ls d"),
        "1\n2\n300000\nbase\nsmall\n"
    );
    let refused = store.try_mount_folder(id, "").err().unwrap();
    assert!(refused.contains("is mounted already"), "{refused}");

    assert_eq!(store.commit(newer), Some(2));
    assert!(!elsewhere.can("cat bind/d/small") && !elsewhere.can("echo 4 >&8"));
    drop((elsewhere, folder, older));
    let next = store.fork("v");
    assert_eq!(sh(&next.path, "cat d/small asked"), "1\n2\nmkdir bind/e");
    assert_all_there(&next.path, acknowledged);
    store.check();
}

#[test]
fn a_commit_beside_a_bind_elsewhere_and_an_overlay_on_top_is_whole_and_final() {
    let store = TestStore::new();
    let base = store.fork("v");
    sh(
        &base.path,
        "mkdir d; head -c 300000 /dev/zero | tr '\\0' b >d/base; echo 1 >d/small",
    );
    assert_eq!(store.commit(base), Some(1));
    let mount = store.fork("v");
    let dir = tempfile::tempdir().unwrap();
    let mut elsewhere = Elsewhere::new(dir.path());
    let at = mount.path.display();
    assert!(elsewhere.can("mkdir bind upper work over"));
    assert!(elsewhere.can(&format!("mount --bind '{at}' bind")));
    assert!(elsewhere.can("mount -t overlay o -o lowerdir=bind,upperdir=upper,workdir=work over"));
    assert!(elsewhere.can("cmp over/d/base bind/d/base; exec 7<over/d/base 8>>bind/d/small"));
    assert!(
        elsewhere.can("echo 2 >&8; echo upper >over/d/upper; rm over/d/base; ! ls over/d/base")
    );

    assert_eq!(store.commit_as(&mount, true), Some(2));
    assert!(
        elsewhere
            .can("echo 3 >&8; echo both >bind/both; [[ $(cat bind/d/small) == $'1\\n2\\n3' ]]")
    );
    assert!(elsewhere.can("cat bind/d/base >/dev/null && [[ $(tr -d b <&7 | wc -c) == 0 ]]"));

    assert_eq!(store.commit_as(&mount, false), Some(3));
    // From now on nothing is taken, and what is read is what was committed.
    for late in [
        "echo 4 >&8",
        "echo late >bind/late",
        "rm bind/d/small",
        "mkdir bind/e",
    ] {
        assert!(!elsewhere.can(late), "{late}");
    }
    assert!(elsewhere.can("[[ $(cat bind/d/small) == $'1\\n2\\n3' && $(cat bind/both) == both ]]"));
    // The overlay is no part of the fork, and goes on above what that was.
    assert!(elsewhere.can("echo more >>over/d/small; [[ $(tail -n 1 over/d/small) == more ]]"));
    drop(mount);
    for late in ["echo 5 >&8", "ls bind", "echo late >bind/late"] {
        assert!(!elsewhere.can(late), "{late} behind the end");
    }
    drop(elsewhere);
    let next = store.fork("v");
    let shown = sh(
        &next.path,
        "find . -type f | sort; cat d/small both; wc -c <d/base",
    );
    assert_eq!(
        shown,
        "./both\n./d/base\n./d/small\n1\n2\n3\nboth\n300000\n"
    );
    let second = |path: &str| {
        let mut out = Vec::new();
        store.engine.cat("v@2", path.as_bytes(), &mut out).unwrap();
        out
    };
    assert_eq!(second("d/small"), b"1\n2\n");
    assert_eq!(second("d/base").len(), 300_000);
    drop(next);
    store.check();
}

#[test]
fn a_fork_that_ends_while_it_is_being_mounted_never_comes_back() {
    let store = TestStore::new();
    let mut random = Random(u64::from(std::process::id()) | 1);
    println!("seed {}", random.0);
    for _ in 0..200 {
        let id = store.fork_only("v");
        let pause = Duration::from_micros(random.next(3000));
        std::thread::scope(|scope| {
            scope.spawn(|| drop(store.try_mount_folder(id, "")));
            std::thread::sleep(pause);
            store.engine.abandon(id).unwrap();
        });
    }
    assert!(store.engine.forks().unwrap().is_empty());
    let store = store.reopened();
    assert!(store.engine.forks().unwrap().is_empty());
}

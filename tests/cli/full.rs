//! A disk that is full to the last byte: what was acknowledged before, meanwhile and behind is there, and nothing else.

use std::collections::BTreeSet;

use super::*;

/// A store on a disk of its own, which is small.
pub struct SmallDisk {
    pub cli: Cli,
}

impl SmallDisk {
    pub fn new() -> SmallDisk {
        let cli = Cli::new();
        fs::create_dir_all(cli.path("config/forkvol")).unwrap();
        let config = "reserve = \"0\"\nmin-free = \"0\"\n";
        fs::write(cli.path("config/forkvol/config.toml"), config).unwrap();
        fs::create_dir(cli.path("store")).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=320m,mode=700", "small"])
            .arg(cli.path("store"))
            .status();
        assert!(mounted.unwrap().success());
        SmallDisk { cli }
    }

    fn ballast(&self) -> PathBuf {
        self.cli.path("store/ballast")
    }

    /// Leaves so much free, by what the ballast takes.
    pub fn leave(&self, bytes: u64) {
        let file = fs::File::options()
            .create(true)
            .append(true)
            .open(self.ballast())
            .unwrap();
        let free = || {
            let room = rustix::fs::statvfs(self.cli.path("store")).unwrap();
            room.f_bavail * room.f_frsize
        };
        let len = file.metadata().unwrap().len();
        let wanted = (len + free()).saturating_sub(bytes);
        if wanted < len {
            file.set_len(wanted).unwrap();
        } else {
            rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, wanted).unwrap();
        }
        println!("{} bytes are free", free());
    }

    /// Leaves not a byte free.
    fn fill(&self) {
        let mut file = fs::File::create(self.ballast()).unwrap();
        for size in [1 << 20, 4096] {
            while std::io::Write::write_all(&mut file, &vec![1; size]).is_ok() {}
        }
    }

    fn log_len(&self, fork: &str) -> u64 {
        let log = self.cli.path("store/forks").join(fork).join("log-00000001");
        fs::metadata(log).unwrap().len()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        for args in [&["abandon", "--all"][..], &["daemon", "stop", "--force"]] {
            self.cli.call(args);
        }
        let mut unmount = Command::new("umount");
        if let Err(error) = unmount.arg("-l").arg(self.cli.path("store")).status() {
            eprintln!("the small disk stays: {error}");
        }
    }
}

/// The same bytes each time, and none that are stored already. An eighth of them goes when they are stored, so they are copied.
fn codes(len: usize) -> Vec<u8> {
    incompressible(len).iter().map(|byte| byte & 0x7f).collect()
}

/// Bytes that stay where they were written.
fn incompressible(len: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 56) as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

fn names(path: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(path).unwrap();
    let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name();
    entries
        .map(|entry| name(entry).into_string().unwrap())
        .collect()
}

fn is_full(error: &std::io::Error) -> bool {
    error.raw_os_error() == Some(28)
}

#[test]
fn an_append_to_the_log_that_a_full_disk_cut_short_costs_nothing_before_or_behind_it() {
    let disk = SmallDisk::new();
    let mount = disk.cli.path("m");
    let fork = disk.cli.ok(&["fork", "v", mount.to_str().unwrap()]);
    for n in 0..40 {
        fs::write(mount.join(format!("f{n:02}")), format!("{n}")).unwrap();
    }
    let long = |n: usize, round: usize| format!("f{n:02}-{round}-{}", "x".repeat(180 + n));
    let mut expected = names(&mount);
    disk.fill();

    // Renames take no room but in the log, which has some that was taken ahead.
    let mut refused = 0;
    for round in 0..20 {
        for n in 0..40 {
            let old = expected
                .iter()
                .find(|name| name.starts_with(&format!("f{n:02}")))
                .unwrap()
                .clone();
            match fs::rename(mount.join(&old), mount.join(long(n, round))) {
                Ok(()) => {
                    expected.remove(&old);
                    expected.insert(long(n, round));
                }
                Err(error) => {
                    assert!(is_full(&error), "{error}");
                    refused += 1;
                }
            }
        }
    }
    assert!(refused > 0, "the disk was never full");
    let len = disk.log_len(&fork);
    assert_ne!(len % 4096, 0, "the end of a page was met by chance");
    let room = 4096 - len % 4096;
    assert!(
        room < 2 * 400,
        "{room} bytes of the last page were not used"
    );
    // New files and content are refused, too, without a trace.
    for n in 0..200 {
        let path = mount.join(format!("new{n}"));
        match fs::write(&path, vec![7; 5_000]) {
            Ok(()) => panic!("{n} was written on a full disk"),
            Err(error) => assert!(is_full(&error), "{error}"),
        }
        if path.exists() {
            expected.insert(format!("new{n}"));
        }
    }
    assert_eq!(names(&mount), expected, "on the full disk");

    fs::remove_file(disk.ballast()).unwrap();
    let begun = Instant::now();
    for n in 0..40 {
        let path = mount.join(format!("later{n}"));
        while let Err(error) = fs::write(&path, vec![n; 9_000]) {
            assert!(is_full(&error), "{error}");
            assert!(
                begun.elapsed() < Duration::from_secs(20),
                "there is room again"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        expected.insert(format!("later{n}"));
    }
    assert_eq!(names(&mount), expected, "with room again");

    disk.cli.kill_daemon();
    disk.cli.ok(&["mount", &fork]);
    assert_eq!(names(&mount), expected, "after the replay");
    for name in &expected {
        let bytes = fs::read(mount.join(name)).unwrap();
        if let Some(n) = name.strip_prefix("later") {
            assert_eq!(bytes, vec![n.parse::<u8>().unwrap(); 9_000], "{name}");
        } else if name.starts_with('f') {
            let n: u32 = name[1..3].parse().unwrap();
            assert_eq!(bytes, n.to_string().as_bytes(), "{name}");
        } else {
            assert_eq!(bytes, b"", "{name} was refused its content");
        }
    }
    disk.cli.ok(&["commit", &fork]);
    let listed = disk.cli.json(&["ls", "v"]);
    assert_eq!(listed["entries"].as_array().unwrap().len(), expected.len());
    disk.cli.check();
}

#[test]
fn a_database_that_met_a_full_disk_goes_on_with_little_room_and_gc_makes_more() {
    let disk = SmallDisk::new();
    let (cli, cache) = (&disk.cli, disk.cli.path("cache"));
    let write = |name: &str, megabytes: u32| {
        let codes = r"LC_ALL=C tr '\200-\377' '\000-\177'";
        format!("head -c {megabytes}000000 /dev/urandom | {codes} > cache/{name}")
    };
    for (volume, name) in [("kept", "f"), ("garbage", "g"), ("kept", "h")] {
        let done = cli.run(volume, &cache, &write(name, 40));
        assert!(done.status.success(), "{done:?}");
    }
    let kept = || ["f", "h"].map(|name| cli.call(&["cat", &format!("kept:{name}")]).stdout);
    let before = kept();
    cli.ok(&["volume", "rm", "garbage"]);
    let mount = cli.path("m");
    let fork = cli.ok(&["fork", "kept", mount.to_str().unwrap()]);
    let big = codes(46_000_000);
    disk.leave(61 << 20);
    fs::write(mount.join("big"), &big).unwrap();
    let (code, line) = cli.fails(&["commit", &fork]);
    assert_eq!(code, 16, "{line}");
    disk.leave(12 << 20);
    let (code, line) = cli.fails(&["gc"]);
    assert_eq!(code, 16, "{line}");
    let wanted = line
        .split("at least ")
        .nth(1)
        .and_then(|rest| rest.split(' ').next());
    let wanted: u64 = wanted.unwrap().parse().unwrap();
    assert!((16..40).contains(&wanted), "{line}");
    assert!(kept() == before, "what was committed is read meanwhile");
    disk.leave((wanted + 1) << 20);
    let pid = cli.daemon_pid();
    let freed = cli.json(&["gc"]);
    let freed = freed["gc"]["freed_bytes"].as_u64().unwrap();
    assert!(freed > 30_000_000, "{freed}");
    assert!(kept() == before);
    disk.leave(80 << 20);
    cli.ok(&["commit", &fork]);
    assert!(cli.call(&["cat", "kept:big"]).stdout == big);
    cli.check();
    assert_eq!(cli.daemon_pid(), pid, "nothing was begun anew");
}

#[test]
fn a_fork_abandoned_on_a_full_disk_stays_abandoned_though_the_daemon_is_killed() {
    let disk = SmallDisk::new();
    let cli = &disk.cli;
    let at = |name: &str| cli.path(name).to_str().unwrap().to_owned();
    let [fork, other] = ["m", "m2"].map(|name| cli.ok(&["fork", "v", &at(name)]));
    fs::write(cli.path("m2/f"), "dropped").unwrap();
    // More than the database has set aside for itself, too.
    disk.leave(72 << 20);
    fs::write(cli.path("m/big"), codes(60_000_000)).unwrap();
    assert_eq!(cli.fails(&["commit", &fork]).0, 16);
    disk.leave(12 << 20);
    cli.ok(&["abandon", &other]);
    // Put aside as long as its record stays, which it does while the database has no room to be opened again in.
    let forks = cli.path("store/forks");
    let mut left = names(&forks);
    left.remove(&format!("{other}.gone"));
    assert_eq!(left, BTreeSet::from([fork.clone()]));
    cli.kill_daemon();
    let listed = cli.json(&["forks"]);
    assert_eq!(listed["forks"].as_array().unwrap().len(), 1, "{listed}");
    assert_eq!(listed["forks"][0]["id"], fork.as_str());
    let begun = Instant::now();
    while names(&forks) != BTreeSet::from([fork.clone()]) {
        assert!(
            begun.elapsed() < Duration::from_secs(20),
            "{:?}",
            names(&forks)
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    disk.leave(120 << 20);
    cli.ok(&["mount", &fork]);
    cli.ok(&["commit", &fork]);
    assert!(cli.call(&["cat", "v:big"]).stdout == codes(60_000_000));
    cli.check();
}

#[test]
fn what_nothing_makes_smaller_is_committed_without_room_for_a_copy_of_it() {
    let disk = SmallDisk::new();
    let cli = &disk.cli;
    let mount = cli.path("m");
    let fork = cli.ok(&["fork", "v", mount.to_str().unwrap()]);
    disk.leave(72 << 20);
    let big = incompressible(60_000_000);
    fs::write(mount.join("big"), &big).unwrap();
    assert_eq!(cli.ok(&["commit", &fork]), "v@1");
    cli.kill_daemon();
    assert!(cli.call(&["cat", "v:big"]).stdout == big);
    cli.check();
    cli.ok(&["volume", "rm", "v"]);
    let freed = cli.json(&["gc"])["gc"]["freed_bytes"].as_u64().unwrap();
    assert!(freed > 55_000_000, "{freed}");
}

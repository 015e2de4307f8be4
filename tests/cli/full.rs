//! A disk that is full to the last byte: what was acknowledged before, meanwhile and behind is there, and nothing else.

use std::collections::BTreeSet;

use super::*;

/// A store on a disk of its own, which is small.
struct SmallDisk {
    cli: Cli,
}

impl SmallDisk {
    fn new() -> SmallDisk {
        let cli = Cli::new();
        fs::create_dir_all(cli.path("config/forkvol")).unwrap();
        fs::write(cli.path("config/forkvol/config.toml"), "reserve = \"0\"\n").unwrap();
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

    // Renames take no room but in the log, whose last page still has some.
    let mut refused = 0;
    for round in 0..8 {
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

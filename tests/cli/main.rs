//! The program as its users call it: commands, exit statuses, a daemon that is killed. Needs root and /dev/fuse.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

mod accidents;
mod caches;
mod damage;
mod docker;
mod environment;
mod exports;
mod few;
mod full;
mod jobs;
mod jobs_told;
mod kills;
mod retention;
mod sockets;
mod trust;
mod unprivileged;
mod workspace;

/// A store of its own with its daemon, which ends with the test.
struct Cli {
    dir: tempfile::TempDir,
}

impl Cli {
    fn new() -> Cli {
        Cli {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_forkvol"));
        command
            .args(args)
            .env("FORKVOL_STORE", self.path("store"))
            .stdin(Stdio::null());
        command
            .env("XDG_CONFIG_HOME", self.path("config"))
            .current_dir(self.dir.path());
        command
    }

    fn call(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// What a command prints that must do well.
    fn ok(&self, args: &[&str]) -> String {
        let output = self.call(args);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(
            output.status.success(),
            "{args:?}: {}",
            text(&output.stderr)
        );
        text(&output.stdout).trim_end().to_owned()
    }

    /// The status and the one line of a command that must fail.
    fn fails(&self, args: &[&str]) -> (i32, String) {
        let output = self.call(args);
        let said = String::from_utf8_lossy(&output.stderr);
        // Whether the daemon that it started ends with a cgroup is up to where the test runs.
        let of_a_cgroup = |line: &&str| line.starts_with("forkvol: warning: the daemon of ");
        let lines: Vec<&str> = said.lines().filter(|line| !of_a_cgroup(line)).collect();
        let line = lines.join("\n");
        assert_eq!(lines.len(), 1, "{args:?}: {line}");
        assert!(line.starts_with("forkvol: "), "{line}");
        (output.status.code().unwrap(), line)
    }

    fn run(&self, volume: &str, path: &Path, script: &str) -> Output {
        self.call(&[
            "run",
            "-v",
            volume,
            "-p",
            path.to_str().unwrap(),
            "--",
            "bash",
            "-c",
            script,
        ])
    }

    fn json(&self, args: &[&str]) -> serde_json::Value {
        serde_json::from_str(&self.ok(&[args, &["--json"]].concat())).unwrap()
    }

    fn daemon_pid(&self) -> u32 {
        let status = self.json(&["daemon", "status"]);
        u32::try_from(status["pid"].as_u64().unwrap()).unwrap()
    }

    /// Nothing is mounted below its folder.
    fn is_unmounted(&self) {
        // Tests beside this one may mount at paths that are no UTF-8.
        let mounts = fs::read("/proc/self/mounts").unwrap();
        let mounts = String::from_utf8_lossy(&mounts);
        let own = self.dir.path().to_str().unwrap();
        assert!(!mounts.contains(own), "{mounts}");
    }

    fn kill_daemon(&self) {
        self.kill(self.daemon_pid());
    }

    /// Ends a daemon at once; returns when nothing is left of it.
    fn kill(&self, pid: u32) {
        forkvol::sys::process::kill(pid, 9).unwrap();
        let begun = Instant::now();
        // Its files are closed by the last of its threads, which may outlive the first.
        let threads = || fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
        while fs::read_to_string(format!("/proc/{pid}/stat"))
            .is_ok_and(|stat| !stat.contains(") Z") || threads() > 1)
        {
            assert!(
                begun.elapsed() < Duration::from_secs(10),
                "the daemon does not end"
            );
            std::thread::yield_now();
        }
    }

    fn check(&self) {
        let report = self.json(&["check"]);
        assert_eq!(
            report["check"]["problems"].as_array().unwrap().len(),
            0,
            "{report}"
        );
    }
}

impl Drop for Cli {
    fn drop(&mut self) {
        for args in [&["abandon", "--all"][..], &["daemon", "stop", "--force"]] {
            if let Err(error) = self.command(args).output() {
                eprintln!("{args:?}: {error}");
            }
        }
    }
}

/// A folder that everybody may look into, for a script that runs in a mount namespace of its own: `$WORK`, with the program in `bin`.
struct Work {
    dir: tempfile::TempDir,
}

impl Work {
    fn new() -> Work {
        let work = Work {
            dir: tempfile::tempdir().unwrap(),
        };
        fs::set_permissions(work.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir(work.at("bin")).unwrap();
        fs::copy(env!("CARGO_BIN_EXE_forkvol"), work.at("bin/forkvol")).unwrap();
        work
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Makes a folder that only a user may look into.
    fn home(&self, name: &str, uid: u32) {
        fs::create_dir(self.at(name)).unwrap();
        std::os::unix::fs::chown(self.at(name), Some(uid), Some(65_534)).unwrap();
        fs::set_permissions(self.at(name), fs::Permissions::from_mode(0o700)).unwrap();
    }

    /// A script as root, where everybody may open the FUSE device. Its environment has what is said here and nothing else.
    fn script(&self, script: &str) -> Command {
        const OPEN: &str = r#"
            mknod "$WORK/fuse" c 10 229
            chmod 666 "$WORK/fuse"
            mount --bind "$WORK/fuse" /dev/fuse
        "#;
        let path = std::env::var("PATH").unwrap();
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--propagation", "private"])
            .args(["bash", "-euo", "pipefail", "-c"])
            .arg(format!("{OPEN}\n{script}"))
            .env_clear()
            .env("WORK", self.dir.path())
            .env("HOME", "/root")
            .env("PATH", format!("{}:{path}", self.at("bin").display()))
            .stdin(Stdio::null());
        command
    }
}

/// What a script prints that must do well.
fn printed(script: &mut Command) -> String {
    let output = script.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    eprintln!("{err}");
    assert!(output.status.success(), "{script:?}\n{out}{err}");
    out
}

#[test]
fn a_job_that_exits_0_is_committed_and_the_next_one_starts_from_it() {
    let cli = Cli::new();
    let cache = cli.path("cache");
    assert_eq!(
        cli.run("npm", &cache, "echo warm > cache/f").status.code(),
        Some(0)
    );
    let second = cli.run("npm", &cache, "cat cache/f");
    assert_eq!(String::from_utf8_lossy(&second.stdout), "warm\n");
    let log = cli.json(&["log", "npm"]);
    assert_eq!(
        log["versions"].as_array().unwrap().len(),
        1,
        "reading makes no version: {log}"
    );
}

#[test]
fn a_job_that_fails_or_is_killed_leaves_the_head_and_keeps_its_status() {
    let cli = Cli::new();
    let cache = cli.path("cache");
    cli.run("v", &cache, "echo 1 > cache/f");
    assert_eq!(
        cli.run("v", &cache, "echo 2 > cache/f; exit 7")
            .status
            .code(),
        Some(7)
    );
    assert_eq!(
        cli.run("v", &cache, "echo 3 > cache/f; kill -TERM $$")
            .status
            .code(),
        Some(143)
    );
    assert_eq!(cli.ok(&["cat", "v:f"]), "1");
    assert_eq!(
        cli.call(&["run", "-v", "v", "--", "/no/such/command"])
            .status
            .code(),
        Some(127)
    );
    assert_eq!(
        cli.call(&["run", "-v", "v", "--", "/etc/passwd"])
            .status
            .code(),
        Some(126)
    );
    assert_eq!(cli.json(&["forks"])["forks"].as_array().unwrap().len(), 0);
}

#[test]
fn jobs_side_by_side_with_the_same_path_see_each_its_own() {
    let cli = Cli::new();
    let cache = cli.path("cache");
    std::thread::scope(|scope| {
        for n in 0..4 {
            let (cli, cache) = (&cli, &cache);
            scope.spawn(move || {
                let script = format!(
                    "echo {n} > cache/f; sleep 0.3; [[ $(cat cache/f) == {n} && $(ls cache) == f ]]"
                );
                assert_eq!(cli.run("v", cache, &script).status.code(), Some(0));
            });
        }
    });
    assert_eq!(
        cli.json(&["log", "v"])["versions"]
            .as_array()
            .unwrap()
            .len(),
        4
    );
}

#[test]
fn the_commands_of_runs_beside_it_hold_no_fork_back() {
    let cli = Cli::new();
    cli.ok(&["fork", "v", cli.path("m").to_str().unwrap()]);
    fs::write(cli.path("m/f"), "1").unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let script = "touch begun; until [ -e over ]; do sleep .01; done";
            cli.run("w", &cli.path("c"), script)
        });
        while !cli.path("begun").exists() {
            std::thread::sleep(Duration::from_millis(5));
        }
        let committed = cli.call(&["commit", "./m", "--busy", "fail"]);
        fs::write(cli.path("over"), "").unwrap();
        assert!(committed.status.success(), "{committed:?}");
        assert_eq!(committed.stderr, b"", "nobody is named");
    });
}

#[test]
fn a_run_ends_with_a_line_that_says_what_became_of_each_volume() {
    let cli = Cli::new();
    let said = |script: &str| {
        let output = cli.run("v", &cli.path("c"), script);
        let said = String::from_utf8(output.stderr).unwrap();
        said.lines().last().unwrap_or_default().to_owned()
    };
    for (script, begins, ends) in [
        ("head -c 5000 /dev/urandom > c/f", "empty", "newly stored"),
        ("cat c/f", "exact", ", 4.9 KiB read, 0 B written) unchanged"),
        ("touch c/g; false", "exact", "abandoned"),
    ] {
        let line = said(script);
        let begins = format!("forkvol: v ({begins} hit, forked in ");
        assert!(line.starts_with(&begins) && line.ends_with(ends), "{line}");
    }
    assert!(said("date > c/f").contains(" committed as v@2, "));
}

#[test]
fn one_daemon_serves_however_many_commands_start_at_once() {
    let cli = Cli::new();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| cli.ok(&["volumes"]));
        }
    });
    let log = fs::read_dir(cli.path("store/log")).unwrap().count();
    assert!(log >= 1);
    cli.daemon_pid();
}

/// > | `fsync(2)` returned | kept | gone with the fork |
/// > When the daemon dies, its mounts answer ENOTCONN at once. The next daemon lists the forks, with everything that had been
/// > acknowledged.
#[test]
fn a_killed_daemon_means_enotconn_and_its_forks_come_back_with_everything() {
    let cli = Cli::new();
    let mount = cli.path("m");
    cli.run("v", &cli.path("cache"), "echo base > cache/base");
    let fork = cli.ok(&["fork", "v", mount.to_str().unwrap()]);
    fs::write(mount.join("f"), "acknowledged").unwrap();
    fs::write(mount.join("synced"), "to the disk").unwrap();
    let synced = fs::File::open(mount.join("synced")).unwrap();
    synced.sync_all().unwrap();
    drop(synced);
    cli.kill_daemon();
    assert_eq!(
        fs::read(mount.join("f")).unwrap_err().raw_os_error(),
        Some(107)
    );
    assert_eq!(cli.json(&["forks"])["forks"][0]["state"], "unmounted");
    assert_eq!(
        cli.json(&["log", "v"])["versions"]
            .as_array()
            .unwrap()
            .len(),
        1,
        "the head has not moved"
    );
    cli.ok(&["mount", &fork]);
    assert_eq!(fs::read_to_string(mount.join("f")).unwrap(), "acknowledged");
    cli.ok(&["commit", &fork]);
    assert_eq!(cli.ok(&["cat", "v:f"]), "acknowledged");
    assert_eq!(cli.ok(&["cat", "v:base"]), "base");
    assert_eq!(cli.ok(&["cat", "v:synced"]), "to the disk");
    cli.check();
}

/// > | `forkvol commit` returned | kept | kept: the version and the head are on disk |
#[test]
fn commits_that_returned_survive_kills_at_any_moment() {
    let cli = Cli::new();
    let mut last = 0;
    for round in 0..6_u64 {
        let mount = cli.path(&format!("m{round}"));
        let fork = cli.ok(&["fork", "v", mount.to_str().unwrap()]);
        let load = "i=0; while echo $i > f$((i % 50)) && head -c 50000 /dev/urandom > r$((i % 7)); do i=$((i + 1)); done";
        let mut writer = Command::new("bash")
            .args(["-c", load])
            .current_dir(&mount)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        for _ in 0..=round {
            let version = cli.ok(&["commit", &fork, "--keep"]);
            last = version.rsplit('@').next().unwrap().parse().unwrap_or(last);
        }
        cli.kill_daemon();
        writer.wait().unwrap();
        assert_eq!(
            cli.json(&["volume", "show", "v"])["volume"]["head"].as_u64(),
            Some(last),
            "round {round}"
        );
        cli.check();
        cli.ok(&["abandon", &fork]);
    }
}

#[test]
fn errors_are_one_line_with_their_own_status() {
    let cli = Cli::new();
    let file = cli.path("file");
    fs::write(&file, "x").unwrap();
    let full = cli.path("full");
    fs::create_dir_all(full.join("x")).unwrap();
    let file = file.to_str().unwrap();
    for (args, status, says) in [
        (&["log", "nothing"][..], 10, "nothing"),
        (&["cat", "nothing:f"], 10, "nothing"),
        (&["commit", "f-000000000000"], 10, "f-000000000000"),
        (&["fork", "bad//name", "m"], 2, "bad//name"),
        (&["fork", "v", file], 1, "file"),
        (&["fork", "v", full.to_str().unwrap()], 1, "full"),
        (&["fork", "v", "m", "--from", "v@7"], 10, "v"),
    ] {
        let (code, line) = cli.fails(args);
        assert!(
            code == status && line.contains(says),
            "{args:?}: {code} {line}"
        );
    }
    let store = format!("{} (FORKVOL_STORE)", cli.path("store").display());
    let (_, line) = cli.fails(&["log", "nothing"]);
    assert!(
        line.ends_with(&format!("lists them; store: {store}")),
        "{line}"
    );
    let (_, line) = cli.fails(&["log", "bad//name"]);
    assert!(!line.contains("store"), "it is a mistake in any: {line}");
    let output = cli.call(&["log", "nothing", "--json"]);
    let said = String::from_utf8(output.stderr).unwrap();
    let document: serde_json::Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    assert_eq!(document["error"]["code"], 10);
    assert_eq!(document["error"]["store"], store);
    let mount = cli.path("m");
    let mount = mount.to_str().unwrap();
    let fork = cli.ok(&["fork", "v", mount]);
    assert_eq!(cli.fails(&["daemon", "stop"]).0, 15);
    assert_eq!(cli.fails(&["volume", "rm", "v"]).0, 15);
    let (code, line) = cli.fails(&["fork", "v", mount]);
    assert!(code != 0 && line.contains(mount), "{line}");
    cli.ok(&["abandon", &fork]);
    cli.ok(&["daemon", "stop"]);
}

#[test]
fn help_can_be_asked_for_in_two_ways_and_says_the_exit_statuses() {
    let cli = Cli::new();
    let text = cli.ok(&["help"]);
    assert_eq!(text, cli.ok(&["--help"]));
    assert!(
        text.contains("Exit status: 0 done") && text.contains("15 busy"),
        "{text}"
    );
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let unread = cli.command(&["--help"]).stdout(full).output().unwrap();
    assert_eq!(unread.status.code(), Some(1));
    let said = String::from_utf8_lossy(&unread.stderr);
    assert!(said.starts_with("forkvol: cannot write to"), "{said}");
    assert_eq!(cli.ok(&["help", "gc"]), cli.ok(&["gc", "--help"]));
    assert!(!cli.path("store").exists());
}

#[test]
fn a_version_is_compared_with_a_fork_by_its_id_or_a_path_inside_its_mount() {
    let cli = Cli::new();
    cli.run("v", &cli.path("cache"), "echo 1 > cache/f");
    let made = cli.json(&["fork", "v", "m"])["fork"].clone();
    assert_eq!(made["mounts"], serde_json::json!([made["mount"]]));
    let fork = made["id"].as_str().unwrap().to_owned();
    fs::create_dir(cli.path("m/d")).unwrap();
    fs::write(cli.path("m/d/g"), "2").unwrap();
    for side in [
        &fork,
        "m",
        "./m",
        "m/../m/d",
        cli.path("m/d/g").to_str().unwrap(),
    ] {
        let side = side
            .strip_prefix("m/")
            .map_or(side.to_owned(), |rest| format!("./m/{rest}"));
        assert_eq!(cli.ok(&["diff", "v", &side]), "+ d\n+ d/g", "{side}");
    }
    assert_eq!(cli.ok(&["diff", "./m", "v@1"]), "- d\n- d/g");
    let stat = cli.json(&["diff", "v", "./m", "--stat"]);
    assert_eq!(
        (stat["a"].as_str(), stat["b"].as_str()),
        (Some("v@1"), Some(&*fork))
    );
    assert_eq!(cli.json(&["ls", "v"])["version"], "v@1");
    assert_eq!(cli.fails(&["diff", "v", "/"]).0, 10);
    let abandoned = cli.json(&["abandon", &fork])["abandoned"][0].clone();
    let gone = abandoned["mounts"][0].as_object().unwrap();
    assert_eq!(gone.get("namespace"), Some(&serde_json::Value::Null));
}

#[test]
fn an_export_is_a_tar_file_that_tar_reads_and_import_takes_back() {
    let cli = Cli::new();
    cli.run(
        "v",
        &cli.path("cache"),
        "mkdir cache/d; echo text > cache/d/f; ln -s d/f cache/l; ln cache/d/f cache/h",
    );
    cli.ok(&["export", "v", "-o", "v.tar"]);
    let listed = Command::new("tar")
        .args(["tf", "v.tar"])
        .current_dir(cli.dir.path())
        .output()
        .unwrap();
    assert!(
        String::from_utf8_lossy(&listed.stdout).contains("d/f"),
        "{listed:?}"
    );
    cli.ok(&["import", "w", "v.tar"]);
    assert_eq!(cli.ok(&["cat", "w:d/f"]), "text");
    assert_eq!(cli.ok(&["diff", "v", "w"]), "");
}

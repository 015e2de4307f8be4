//! Jobs that were cut off, lost their daemon, or would cover one another.

use super::*;

#[test]
fn an_attach_that_was_cut_off_is_made_whole_by_the_next_and_committed_by_none() {
    let cli = Cli::new();
    let args = ["-v", "v", "-p", "c", "-v", "two", "-p", "a", "-p", "b"];
    let mut cut = 0;
    for time in 1..40 {
        let root = cli.path("mounts");
        let all = [
            "attach",
            "--job",
            "1",
            "--mount-root",
            root.to_str().unwrap(),
        ];
        let mut first = cli.command(&[&all[..], &args].concat());
        let mut first = first
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_micros(time * 1000));
        cut += u32::from(first.try_wait().unwrap().is_none());
        first.kill().unwrap();
        first.wait().unwrap();
        if time % 2 == 0 {
            // The job ends without having been attached.
            cli.finish("1", "0");
        } else {
            let attached = cli.attach("1", &args);
            assert_eq!(attached["degraded"], false, "{attached}");
            for path in ["c", "a", "b"] {
                fs::write(cli.path(path).join("f"), format!("{time} {path}")).unwrap();
            }
            cli.finish("1", "0");
            assert_eq!(cli.ok(&["cat", "two:b/f"]), format!("{time} b"));
        }
        println!("{time} ms");
        cli.is_unmounted();
        // A fork that nobody had been told of is the daemon's to drop, as soon as it sees that who asked for it is gone.
        let no_forks = || {
            cli.ok(&["abandon", "--orphans"]);
            cli.ok(&["forks"]).is_empty()
        };
        let until = Instant::now() + Duration::from_secs(10);
        while !no_forks() {
            assert!(Instant::now() < until, "{time} ms");
        }
        for made in ["a", "b", "c", "mounts/1"] {
            assert!(!cli.path(made).exists(), "{time} ms: {made} is left over");
        }
    }
    println!("{cut} of 39 were cut off");
    assert!(cut > 0);
    let log = cli.json(&["log", "two"]);
    assert_eq!(log["versions"].as_array().unwrap().len(), 20, "{log}");
}

#[test]
fn a_job_that_lost_its_daemon_commits_nothing_though_it_says_that_it_did_well() {
    let cli = Cli::new();
    cli.run("v", &cli.path("c"), "echo kept > c/f; echo kept > c/g");
    cli.attach("1", &["-v", "v", "-p", "c", "-v", "w"]);
    fs::write(cli.path("c/f"), "half").unwrap();
    cli.kill_daemon();
    assert!(fs::write(cli.path("c/g"), "lost").is_err());
    let done = cli.finish("1", "0");
    assert_eq!(
        (&done["v"], &done["w"]),
        (&"abandoned".into(), &"abandoned".into())
    );
    let left = fs::read_dir(cli.path("c")).unwrap().count();
    assert_eq!(left, 0, "its mount is gone");

    let script = format!(
        "echo half > c/f; kill -9 {}; while echo lost > c/g; do :; done; true",
        cli.daemon_pid()
    );
    let ran = cli.run("v", &cli.path("c"), &script);
    assert_eq!(ran.status.code(), Some(0));
    let said = String::from_utf8_lossy(&ran.stderr).into_owned();
    assert!(
        said.contains("nothing is committed: the daemon was lost"),
        "{said}"
    );
    assert_eq!(cli.ok(&["cat", "v:f"]), "kept");
    assert_eq!(cli.numbers("v"), [1]);
    assert_eq!(cli.ok(&["forks"]), "");
}

#[test]
fn a_path_in_another_one_is_seen_whatever_the_order_and_none_is_covered() {
    let cli = Cli::new();
    for (job, args) in [
        ("1", ["-v", "in", "-p", "n/inner", "-v", "out", "-p", "n"]),
        ("2", ["-v", "out", "-p", "n", "-v", "in", "-p", "n/inner"]),
    ] {
        cli.attach(job, &args);
        fs::write(cli.path("n/inner/f"), job).unwrap();
        fs::write(cli.path("n/g"), job).unwrap();
        let (status, line) = cli.fails(&["attach", "--strict", "--job", "3", "-v", "x", "-p", "n"]);
        assert!(
            status == 15 && line.contains(&format!("attached by job {job}")),
            "{line}"
        );
        let finish = cli.call(&["finish", "--job", job, "--status", "0"]);
        let said = String::from_utf8_lossy(&finish.stderr).into_owned();
        // Whoever makes a mount namespace meanwhile has a copy of every mount of the machine, and is named as using it.
        let warned = |line: &str| line.contains("warning") && !line.contains("still in use");
        assert!(!said.lines().any(warned), "{said}");
        assert_eq!(cli.ok(&["cat", "in:f"]), job);
        assert_eq!(cli.ok(&["cat", "out:g"]), job);
    }
    cli.attach("4", &["-v", "in", "-p", "n/inner"]);
    for args in [&["--job", "5"][..], &["--job", "4", "--add"]] {
        let args = [&["attach", "--strict", "-v", "out", "-p", "n"], args].concat();
        assert_eq!(cli.fails(&args).0, 15, "n/inner would be covered");
    }
    assert_eq!(
        cli.fails(&[
            "attach", "--job", "6", "-v", "a", "-p", "p", "-v", "b", "-p", "./p"
        ])
        .0,
        2
    );
}

#[test]
fn the_mount_of_another_fork_at_the_same_place_is_left_alone() {
    let cli = Cli::new();
    let mount = cli.path("m");
    let first = cli.ok(&["fork", "v", "m"]);
    cli.kill_daemon();
    let unmounted = Command::new("umount").arg(&mount).status().unwrap();
    assert!(unmounted.success());
    // The kernel gives it the number that the first one had.
    let second = cli.ok(&["fork", "w", "m"]);
    let refused = cli.call(&["mount", &first]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(15), "{said}");
    assert!(said.contains(&format!("forkvol:w:{second}")), "{said}");
    cli.ok(&["abandon", &first]);
    fs::write(cli.path("m/f"), "of the second").unwrap();
    cli.ok(&["commit", "./m"]);
    assert_eq!(cli.ok(&["cat", "w:f"]), "of the second");
}

#[test]
fn a_commit_of_a_fork_that_nobody_serves_takes_away_what_is_left_of_its_mount() {
    let cli = Cli::new();
    for by_hand in [false, true] {
        let fork = cli.ok(&["fork", "v", "m"]);
        fs::write(cli.path("m/f"), format!("{by_hand}")).unwrap();
        if by_hand {
            let unmounted = Command::new("umount").arg(cli.path("m")).status();
            assert!(unmounted.unwrap().success());
        } else {
            cli.kill_daemon();
        }
        cli.ok(&["commit", &fork]);
        cli.is_unmounted();
        assert!(!cli.path("m").exists(), "{by_hand}");
        assert_eq!(cli.ok(&["cat", "v:f"]), format!("{by_hand}"));
    }
}

#[test]
fn a_command_that_ends_its_fork_itself_is_told_that_nothing_more_is_committed() {
    let cli = Cli::new();
    let program = env!("CARGO_BIN_EXE_forkvol");
    let script = format!("echo 1 > c/f; {program} commit ./c");
    let output = cli.run("v", &cli.path("c"), &script);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(
        said.contains("was committed or abandoned while the command ran"),
        "{said}"
    );
    assert!(!said.contains("left over"), "{said}");
    assert_eq!(cli.ok(&["cat", "v:f"]), "1");
    cli.is_unmounted();
}

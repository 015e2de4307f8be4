//! What a job, and who looks at it, is told: variables, statuses, and lines that name the next step.

use super::*;
use forkvol::sys::process;

/// A command's status, and what it says beside its document.
fn said(output: &Output) -> (Option<i32>, String) {
    let text = String::from_utf8_lossy(&output.stderr);
    // Whoever makes a mount namespace meanwhile has a copy of every mount of the machine, and is named as using it.
    let own = text.lines().filter(|line| !line.contains("still in use"));
    (output.status.code(), own.collect::<Vec<_>>().join("\n"))
}

impl Cli {
    /// Attaches; returns the variables, and what was said beside them.
    fn told(&self, job: &str, args: &[&str]) -> (String, String) {
        let start = ["attach", "--mount-root", "mounts", "--job", job];
        let output = self.call(&[&start[..], args].concat());
        let (status, text) = said(&output);
        assert_eq!(status, Some(0), "{text}");
        (String::from_utf8(output.stdout).unwrap(), text)
    }

    /// The status of an end that fails, and its only line.
    fn ends_badly(&self, args: &[&str]) -> (i32, String) {
        let (status, text) = said(&self.call(args));
        assert_eq!(text.lines().count(), 1, "{text}");
        (status.unwrap(), text)
    }
}

#[test]
fn a_strict_attach_of_a_job_that_goes_without_a_volume_fails() {
    let cli = Cli::new();
    fs::create_dir(cli.path("full")).unwrap();
    cli.write("full/f", "x");
    let args = ["-v", "v", "-p", "full", "--existing", "fail"];
    cli.attach("1", &args);
    let strict = [&["attach", "--strict", "--job", "1"], &args[..]].concat();
    let (status, line) = cli.fails(&strict);
    assert_eq!(status, 1);
    assert!(line.contains("job 1 goes without v: "), "{line}");
    assert!(line.contains("full is not empty"), "{line}");
    assert_eq!(cli.attach("1", &args)["degraded"], true);
}

#[test]
fn a_strict_end_fails_where_something_is_lost_and_takes_the_mounts_away_all_the_same() {
    let cli = Cli::new();
    let end = ["finish", "--strict", "--job", "1", "--status", "0"];
    cli.attach("1", &["-v", "v", "-p", "c"]);
    cli.write("c/f", "kept");
    cli.ok(&end);
    let unmount = format!("umount {}", cli.path("c").display());
    let accidents = [
        ("rm c/f", "all of ", "was removed while the job ran"),
        (&unmount, "c was removed or replaced", "while the job ran"),
    ];
    for (accident, why, more) in accidents {
        cli.attach("1", &["-v", "v", "-p", "c"]);
        let mut shell = Command::new("sh");
        let shell = shell.args(["-c", accident]).current_dir(cli.dir.path());
        assert!(shell.status().unwrap().success());
        let (status, line) = cli.ends_badly(&end);
        assert_eq!(status, 1, "{line}");
        for part in ["job 1: nothing is committed: ", why, more] {
            assert!(line.contains(part), "{part} in {line}");
        }
        cli.is_unmounted();
        assert_eq!(cli.json(&["jobs"])["jobs"], serde_json::json!([]));
        assert_eq!(cli.ok(&["cat", "v:f"]), "kept");
    }
    fs::create_dir(cli.path("full")).unwrap();
    cli.write("full/f", "x");
    let args = ["--existing", "fail", "-v", "v", "-p", "c", "-v", "w"];
    cli.attach("1", &[&args[..], &["-p", "full"]].concat());
    cli.write("c/g", "new");
    let (status, line) = cli.ends_badly(&end);
    assert_eq!(status, 1, "{line}");
    assert!(line.contains("job 1: w is not committed: "), "{line}");
    assert_eq!(cli.ok(&["cat", "v:g"]), "new", "the others are committed");
    cli.is_unmounted();
}

#[test]
fn names_and_ends_that_are_missing_and_agents_that_are_no_process_are_mistakes() {
    let cli = Cli::new();
    let volume = ["-v", "v", "-p", "c"];
    for (args, why) in [
        (&["attach", "--job", ""][..], "the name is empty"),
        (
            &["attach", "--job", "1", "--join", " "],
            "the name is empty",
        ),
        (
            &["attach", "--job", "1", "--agent-pid", "4194305"],
            "--agent-pid 4194305 is no process",
        ),
        (
            &["attach", "--job", "1", "--read-only", "--existing", "seed"],
            "volume v is read-only and cannot be seeded",
        ),
        (
            &["attach", "--job", "1", "-v", "n", "-p", "x/sub", "-p", "x"],
            "volume n has x/sub within x",
        ),
    ] {
        let (status, line) = cli.fails(&[args, &volume].concat());
        assert!(status == 2 && line.contains(why), "{status}: {line}");
    }
    for args in [
        &["finish", "--job", "", "--status", "0"][..],
        &["finish", "--join", "", "--status", "0"],
    ] {
        let (status, line) = cli.fails(args);
        assert!(status == 2 && line.contains("the name is empty"), "{line}");
    }
    for args in [&["finish", "--job", "1"][..], &["finish"]] {
        let (status, line) = cli.fails(args);
        assert_eq!(status, 2, "{line}");
        for part in ["--status", "--outcome", "--stale", "--join"] {
            assert!(line.contains(part), "{part} in {line}");
        }
    }
    let run = ["run", "-v", "n", "-p", "x", "-p", "x/sub", "--", "true"];
    let (status, line) = cli.fails(&run);
    assert!(status == 125 && line.contains("x/sub within x"), "{line}");
    assert!(!cli.path("x").exists() && !cli.path("c").exists());
    // A host's variable may be of a process that is gone; that is nobody's mistake.
    let args = ["attach", "--job", "1", "--mount-root", "mounts"];
    let mut attach = cli.command(&[&args, &volume[..]].concat());
    let attach = attach.env("BUILDKITE_AGENT_PID", "4194305");
    assert!(attach.output().unwrap().status.success());
    assert_eq!(cli.finish("1", "0")["v"], "committed as v@1");
}

#[test]
fn a_volume_that_has_a_version_is_not_committed_if_missing_and_it_is_said_at_both_ends() {
    let cli = Cli::new();
    let args = ["-v", "v", "-p", "c", "--commit", "if-missing"];
    for (job, variable, outcome) in [
        ("1", "FORKVOL_COMMIT_V='yes'", "committed as v@1"),
        (
            "2",
            "FORKVOL_COMMIT_V='no: there is a version already'",
            "not committed",
        ),
    ] {
        let (variables, _) = cli.told(job, &args);
        assert!(variables.contains(variable), "{variables}");
        cli.write("c/f", job);
        let end = ["finish", "--json", "--job", job, "--status", "0"];
        let output = cli.call(&end);
        let (_, text) = said(&output);
        assert!(text.contains(outcome), "{text}");
        assert!(!text.contains("warning"), "{text}");
        let done: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(done["finish"]["volumes"]["v"], outcome);
    }
    // Another job was faster; and what is said at the end wins.
    cli.told("3", &["-v", "w", "-p", "c", "--commit", "if-missing"]);
    cli.run("w", &cli.path("d"), "echo first > d/f");
    cli.write("c/f", "second");
    assert_eq!(cli.finish("3", "0")["w"], "not committed");
    cli.told("4", &args);
    cli.write("c/f", "always");
    let end = ["finish", "--job", "4", "--status", "0", "--commit"];
    cli.ok(&[&end[..], &["always"]].concat());
    assert_eq!(cli.ok(&["cat", "v:f"]), "always");
}

#[test]
fn what_was_asked_for_is_no_warning_and_a_job_that_goes_on_is_not_abandoned() {
    let cli = Cli::new();
    for option in ["--read-only", "--ephemeral"] {
        cli.attach("1", &["-v", "v", "-p", "c", option]);
        let end = ["finish", "--strict", "--job", "1", "--status", "0"];
        let (status, text) = said(&cli.call(&end));
        assert_eq!(status, Some(0));
        assert_eq!(text.lines().count(), 1, "{text}");
        let why = format!("not committed: it is {}", &option[2..]);
        assert!(text.contains(&why), "{text}");
    }
    cli.attach("1", &["-v", "v", "-p", "c"]);
    let keep = ["finish", "--keep", "--job", "1", "--status", "1"];
    let kept = cli.json(&keep);
    assert_eq!(kept["finish"]["volumes"]["v"], "not committed");
    cli.write("c/f", "x");
    assert_eq!(cli.finish("1", "0")["v"], "committed as v@1");
}

#[test]
fn a_job_is_handed_no_folder_of_another_s_where_it_goes_without_its_volume() {
    let cli = Cli::new();
    cli.attach("1", &["-v", "v", "-p", "c"]);
    cli.attach("1", &["--add", "-v", "l", "-p", "l", "--link", "symlink"]);
    fs::create_dir(cli.path("full")).unwrap();
    cli.write("full/f", "x");
    let fail = ["--existing", "fail"];
    for path in ["c", "l", "full", "/"] {
        let (variables, text) = cli.told("2", &[&["-v", "w", "-p", path], &fail[..]].concat());
        assert!(
            variables.contains("FORKVOL_DIR_W=''"),
            "{path}: {variables}"
        );
        assert!(
            text.contains("job 2 goes without w: empty hit"),
            "{path}: {text}"
        );
        cli.finish("2", "0");
    }
    // An empty folder is the job's.
    let link = ["-v", "w", "-p", "node_modules", "--link", "symlink"];
    let (variables, _) = cli.told("2", &link);
    let line = format!(
        "FORKVOL_DIR_W='{}'",
        cli.path("node_modules").to_str().unwrap()
    );
    assert!(variables.contains(&line), "{variables}");
    cli.finish("2", "0");
    let some = ["-v", "x", "-p", "x", "-v", "w", "-p", "full"];
    let (_, text) = cli.told("2", &[&some[..], &fail].concat());
    assert!(text.contains("job 2 has x, goes without w: "), "{text}");
}

#[test]
fn the_folder_of_a_volume_is_what_is_at_its_only_path() {
    let cli = Cli::new();
    cli.write("one.yml", "cache: {name: one, paths: a/b, scope: global}\n");
    let folder = |variables: &str, name: &str| -> PathBuf {
        let start = format!("FORKVOL_DIR_{name}='");
        let mut lines = variables.lines();
        let line = lines.find_map(|line| line.strip_prefix(&start)).unwrap();
        line.trim_end_matches('\'').into()
    };
    for link in ["bind", "symlink"] {
        let (variables, _) = cli.told("1", &["--config", "one.yml", "--link", link]);
        cli.write("a/b/f", link);
        let dir = folder(&variables, "ONE");
        assert_eq!(fs::read_to_string(dir.join("f")).unwrap(), link);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
        let done = cli.finish("1", "0");
        assert!(done["one"].as_str().unwrap().starts_with("committed"));
        assert_eq!(cli.ok(&["cat", "one:a__b/f"]), link);
    }
    let (variables, _) = cli.told(
        "1",
        &["-v", "v", "-p", "a", "-p", "b", "-v", "w", "-p", "c"],
    );
    cli.write("b/f", "of several");
    cli.write("c/f", "of one");
    let [several, one] = ["V", "W"].map(|name| folder(&variables, name));
    assert_eq!(
        fs::read_to_string(several.join("b/f")).unwrap(),
        "of several"
    );
    assert_eq!(fs::read_to_string(one.join("f")).unwrap(), "of one");
}

#[test]
fn a_commit_that_a_rollback_forbids_names_what_can_be_done_when_the_job_is_over() {
    let cli = Cli::new();
    cli.run("v", &cli.path("c"), "echo 1 > c/f");
    cli.run("v", &cli.path("c"), "echo 2 > c/f");
    cli.attach("1", &["-v", "v", "-p", "c"]);
    cli.write("c/f", "3");
    cli.ok(&["rollback", "v", "v@1"]);
    let end = ["finish", "--strict", "--job", "1", "--status", "0"];
    let (status, line) = cli.ends_badly(&[&end[..], &["--keep"]].concat());
    assert!(
        status == 11 && line.contains("commit --keep --force PATH"),
        "{line}"
    );
    let (status, line) = cli.ends_badly(&end);
    assert_eq!(status, 11);
    assert!(
        line.contains("job 1: ") && line.contains("what it wrote is dropped; run the job again"),
        "{line}"
    );
    assert!(!line.contains("--force"), "{line}");
    assert_eq!(cli.ok(&["forks"]), "");
}

#[test]
fn nothing_is_attached_for_variables_that_cannot_be_written() {
    let cli = Cli::new();
    let folder = cli.path("store/jobs");
    for file in ["none/job.env", "."] {
        let attach = ["attach", "--job", "1", "-v", "v", "-p", "c", "--env-file"];
        let (status, line) = cli.fails(&[&attach[..], &[file]].concat());
        assert_eq!(status, 1);
        assert!(line.contains("cannot write the variables to "), "{line}");
        assert!(!cli.path("c").exists() && !folder.exists(), "{file}");
    }
    cli.write("job.env", "old");
    let attach = ["-v", "v", "-p", "c", "--env-file", "job.env"];
    assert_eq!(cli.told("1", &attach).0, "");
    let variables = fs::read_to_string(cli.path("job.env")).unwrap();
    assert!(variables.starts_with("FORKVOL_JOB='1'\n"), "{variables}");
}

#[test]
fn a_relative_path_names_the_fork_that_is_mounted_there() {
    let cli = Cli::new();
    cli.attach(
        "1",
        &["-v", "v", "-p", "node_modules", "-v", "w", "-p", "w"],
    );
    cli.write("node_modules/f", "x");
    let commit = ["commit", "--keep", "node_modules"];
    assert_eq!(cli.ok(&commit), "v@1");
    let (status, line) = cli.fails(&["commit", "--keep", "modules"]);
    assert!(
        status == 10 && line.contains("none is mounted at ./modules"),
        "{line}"
    );
    let (status, line) = cli.fails(&["commit", "f-000000000001"]);
    assert!(status == 10 && !line.contains("./"), "{line}");
    // In a fork every word is a path.
    let mut inside = cli.command(&["commit", "--keep", "typo"]);
    let inside = inside.current_dir(cli.path("w")).output().unwrap();
    assert_eq!(inside.status.code(), Some(10));
}

#[test]
fn who_waits_for_a_daemon_that_hangs_is_told_for_which_job_and_what_to_do() {
    let cli = Cli::new();
    cli.attach("1", &["-v", "v", "-p", "c"]);
    cli.write("c/f", "x");
    let pid = cli.daemon_pid();
    process::kill(pid, 19).unwrap();
    let end = ["finish", "--job", "1", "--status", "0"];
    let begin = ["attach", "--job", "2", "-v", "w", "-p", "d"];
    let commands: [&[&str]; 3] = [&end, &begin, &["finish", "--stale"]];
    let late = commands.map(|args| {
        let strict = ["--strict", "--deadline", "300ms"];
        said(&cli.call(&[args, &strict].concat()))
    });
    process::kill(pid, 18).unwrap();
    let parts = [
        "job 1 is not done within 0.3 s; see forkvol daemon status, then finish again",
        "job 2 is not done within 0.3 s; see forkvol daemon status, or give it a longer --deadline",
        "finish --stale is not done within 0.3 s; see forkvol daemon status, then finish --stale",
    ];
    for ((status, line), part) in late.iter().zip(parts) {
        assert_eq!(*status, Some(15), "{line}");
        assert!(line.contains(part), "{part} in {line}");
    }
    assert_eq!(cli.finish("1", "0")["v"], "committed as v@1");
}

#[test]
fn a_job_one_of_whose_forks_was_committed_by_hand_says_that_the_others_are_not() {
    let cli = Cli::new();
    cli.attach("1", &["-v", "v", "-p", "c", "-v", "w", "-p", "d"]);
    for path in ["c/f", "d/f"] {
        fs::write(cli.path(path), "work").unwrap();
    }
    cli.ok(&["commit", "./c"]);
    let end = ["finish", "--strict", "--job", "1", "--status", "0"];
    let output = cli.call(&end);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("w: not committed"), "{said}");
    assert_eq!(cli.ok(&["cat", "v:f"]), "work");
    assert_eq!(cli.ok(&["forks"]), "");
    cli.is_unmounted();
}

#[test]
fn what_a_checkout_links_to_elsewhere_is_not_covered_and_no_two_paths_share_a_folder() {
    let cli = Cli::new();
    let elsewhere = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(elsewhere.path(), cli.path("node_modules")).unwrap();
    for path in ["node_modules", "./node_modules/below"] {
        let (status, line) =
            cli.fails(&["attach", "--strict", "--job", "1", "-v", "v", "-p", path]);
        assert!(status != 0 && line.contains("leads to"), "{line}");
    }
    assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 0);
    let named = elsewhere.path().to_str().unwrap();
    cli.attach("2", &["-v", "v", "-p", named]);
    cli.finish("2", "0");
    let twice = ["attach", "--job", "3", "-v", "v", "-p", "a/b", "-p", "a__b"];
    let (status, line) = cli.fails(&twice);
    assert!(status == 2 && line.contains("share a folder"), "{line}");
}

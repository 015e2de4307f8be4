//! Jobs whose start and end are different processes.

use forkvol::protocol::{Answer, Commit, Connection, Hello, Request, When};

use super::*;

impl Cli {
    pub fn attach(&self, job: &str, args: &[&str]) -> serde_json::Value {
        let root = self.path("mounts");
        let all = [
            &[
                "attach",
                "--job",
                job,
                "--mount-root",
                root.to_str().unwrap(),
            ],
            args,
        ]
        .concat();
        self.json(&all)["attach"].clone()
    }

    pub fn finish(&self, job: &str, status: &str) -> serde_json::Value {
        self.json(&["finish", "--job", job, "--status", status])["finish"]["volumes"].clone()
    }

    fn stale(&self) -> serde_json::Value {
        self.json(&["finish", "--stale"])["stale"].clone()
    }

    /// Writes something else into the file of a job.
    pub fn change_job(&self, job: &str, change: impl FnOnce(&mut serde_json::Value)) {
        let file = self.path(&format!("store/jobs/{job}.json"));
        let mut document = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        change(&mut document);
        fs::write(&file, document.to_string()).unwrap();
    }

    /// Has the daemon commit all forks, or abandon them, and does nothing of what would come then.
    fn only_in_the_daemon(&self, end: impl FnOnce(Vec<String>) -> Request) {
        let forks = self.json(&["forks"]);
        let forks = forks["forks"].as_array().unwrap().iter();
        let forks = forks.map(|fork| fork["id"].as_str().unwrap().to_owned());
        let socket =
            std::os::unix::net::UnixStream::connect(self.path("store/forkvol.sock")).unwrap();
        let mut daemon = Connection::new(socket);
        for request in [Request::Hello(Hello::ours()), end(forks.collect())] {
            daemon.send(&request).unwrap();
            let answer: Answer = daemon
                .receive(1 << 20, Some(Duration::from_secs(60)))
                .unwrap();
            assert!(!matches!(answer, Answer::Error(_)), "{answer:?}");
        }
    }
}

#[test]
fn what_a_job_leaves_in_its_paths_is_there_for_the_next_one() {
    let cli = Cli::new();
    fs::create_dir(cli.path("hidden")).unwrap();
    fs::write(cli.path("hidden/own"), "of the checkout").unwrap();
    let args = [
        "-v", "npm", "-p", "a/cache", "-v", "tools", "-p", "hidden", "-p", "x/y",
    ];
    let attached = cli.attach("1", &args);
    assert_eq!(attached["hit"], "empty");
    assert!(!cli.path("hidden/own").exists(), "it is covered");
    for path in ["a/cache/f", "hidden/f", "x/y/f"] {
        fs::write(cli.path(path), path).unwrap();
    }
    assert_eq!(
        cli.attach("1", &args),
        attached,
        "the same question has the same answer"
    );
    let done = cli.finish("1", "0");
    assert_eq!(done["npm"], "committed as npm@1");
    assert_eq!(done["tools"], "committed as tools@1");
    assert_eq!(
        fs::read_to_string(cli.path("hidden/own")).unwrap(),
        "of the checkout"
    );
    for made in ["a", "x", "mounts/1"] {
        assert!(!cli.path(made).exists(), "{made} is left over");
    }
    assert!(
        cli.finish("1", "0").is_null(),
        "a second finish has nothing to do"
    );

    assert_eq!(cli.attach("2", &args)["hit"], "exact");
    for path in ["a/cache/f", "hidden/f", "x/y/f"] {
        assert_eq!(fs::read_to_string(cli.path(path)).unwrap(), path);
    }
    fs::write(cli.path("a/cache/g"), "of a job that fails").unwrap();
    assert_eq!(cli.finish("2", "1")["npm"], "abandoned");
    assert_eq!(cli.json(&["volume", "show", "npm"])["volume"]["head"], 1);
}

#[test]
fn a_job_that_lost_its_path_or_all_its_content_commits_nothing() {
    let cli = Cli::new();
    cli.attach("0", &["-v", "v", "-p", "c"]);
    fs::write(cli.path("c/f"), "kept").unwrap();
    cli.finish("0", "0");
    cli.attach("0", &["-v", "two", "-p", "a", "-p", "b"]);
    fs::write(cli.path("a/f"), "kept").unwrap();
    fs::write(cli.path("b/f"), "kept").unwrap();
    cli.finish("0", "0");
    let unmount = format!("umount {}", cli.path("c").display());
    for accident in ["rm -rf c/*", &unmount, "rm -rf a/*"] {
        cli.attach(
            "1",
            &["-v", "v", "-p", "c", "-v", "two", "-p", "a", "-p", "b"],
        );
        fs::write(cli.path("b/new"), "of a job that lost something").unwrap();
        let script = ["-c", accident];
        assert!(
            Command::new("sh")
                .args(script)
                .current_dir(cli.dir.path())
                .status()
                .unwrap()
                .success()
        );
        let done = cli.finish("1", "0");
        assert_eq!(
            (&done["v"], &done["two"]),
            (&"abandoned".into(), &"abandoned".into()),
            "{accident}"
        );
        assert_eq!(cli.ok(&["cat", "v:f"]), "kept");
        assert_eq!(cli.ok(&["cat", "two:a/f"]), "kept");
    }
    assert!(!cli.path("c").exists());
}

#[test]
fn labels_make_a_hit_exact_or_stale_and_parents_make_it_a_fallback() {
    let cli = Cli::new();
    let attach = |job: &str, args: &[&str]| cli.attach(job, args)["hit"].clone();
    assert_eq!(
        attach("1", &["-v", "v", "-p", "c", "--label", "lock=1"]),
        "empty"
    );
    fs::write(cli.path("c/f"), "1").unwrap();
    cli.finish("1", "0");
    for (job, label, hit) in [("2", "lock=1", "exact"), ("3", "lock=2", "stale")] {
        assert_eq!(attach(job, &["-v", "v", "-p", "c", "--label", label]), hit);
        cli.finish(job, "1");
    }
    let parents = [
        "-v",
        "v/branch/x",
        "-p",
        "c",
        "--parent",
        "none",
        "--parent",
        "v",
    ];
    let said = cli.call(
        &[
            &["attach", "--job", "4", "--mount-root", "mounts"],
            &parents[..],
        ]
        .concat(),
    );
    let said = String::from_utf8(said.stderr).unwrap();
    assert!(
        said.contains("has v/branch/x from v@1: fallback hit"),
        "{said}"
    );
    assert_eq!(fs::read_to_string(cli.path("c/f")).unwrap(), "1");
    cli.finish("4", "1");
}

#[test]
fn the_labels_of_a_file_are_those_around_its_signs() {
    let cli = Cli::new();
    fs::write(cli.path("labels"), "# of the image\n os =  debian 12 \n").unwrap();
    let fork = cli.ok(&["fork", "v", "m", "--label-file", "labels"]);
    fs::write(cli.path("m/f"), "x").unwrap();
    cli.ok(&["commit", &fork]);
    let labels = cli.json(&["log", "v"])["versions"][0]["labels"].clone();
    assert_eq!(labels, serde_json::json!({"os": "debian 12"}));
}

#[test]
fn a_job_whose_agent_was_killed_is_cleared_away_and_the_next_one_is_warm() {
    let cli = Cli::new();
    cli.attach("0", &["-v", "v", "-p", "c"]);
    fs::write(cli.path("c/f"), "warm").unwrap();
    cli.finish("0", "0");
    let mut agent = Command::new("sleep").arg("600").spawn().unwrap();
    let pid = agent.id().to_string();
    cli.attach("1", &["-v", "v", "-p", "c", "--agent-pid", &pid]);
    fs::write(cli.path("c/half"), "half").unwrap();
    assert!(
        cli.json(&["finish", "--stale"])["stale"]
            .as_array()
            .unwrap()
            .is_empty()
    );
    agent.kill().unwrap();
    agent.wait().unwrap();
    assert_eq!(cli.json(&["jobs"])["jobs"][0]["state"], "stale");
    assert_eq!(
        cli.json(&["finish", "--stale"])["stale"],
        serde_json::json!(["1"])
    );
    assert!(!cli.path("c").exists());
    assert_eq!(cli.attach("1", &["-v", "v", "-p", "c"])["hit"], "exact");
    assert!(!cli.path("c/half").exists());
    assert_eq!(cli.finish("1", "0")["v"], "unchanged");
}

#[test]
fn a_job_whose_daemon_was_killed_is_attached_again() {
    let cli = Cli::new();
    cli.attach("0", &["-v", "v", "-p", "c"]);
    fs::write(cli.path("c/f"), "kept").unwrap();
    cli.finish("0", "0");
    cli.attach("1", &["-v", "v", "-p", "c"]);
    fs::write(cli.path("c/first"), "half").unwrap();
    cli.kill_daemon();
    let attach = |more: &[&str]| {
        let output = cli.call(&[&["attach", "--job", "1"], more].concat());
        let said = String::from_utf8(output.stderr).unwrap();
        (output.status.code(), said)
    };
    let (code, said) = attach(&["--add", "-v", "w", "-p", "d", "--strict"]);
    assert!(
        code == Some(1) && said.contains("has lost its forks"),
        "{said}"
    );
    let (code, said) = attach(&["-v", "v", "-p", "c"]);
    assert!(
        code == Some(0) && said.contains("nothing of it will be committed"),
        "{said}"
    );
    assert_eq!(cli.attach("1", &["-v", "v", "-p", "c"])["hit"], "exact");
    assert_eq!(fs::read_to_string(cli.path("c/f")).unwrap(), "kept");
    fs::write(cli.path("c/second"), "half").unwrap();
    let ended = cli.call(&["finish", "--job", "1", "--status", "0"]);
    let said = String::from_utf8(ended.stderr).unwrap();
    assert!(
        said.contains("nothing is committed: the forks of job 1 were lost"),
        "{said}"
    );
    assert_eq!(cli.numbers("v"), [1]);
    // The next of that name is another job.
    cli.attach("1", &["-v", "v", "-p", "c"]);
    fs::write(cli.path("c/f"), "whole").unwrap();
    assert_eq!(cli.finish("1", "0")["v"], "committed as v@2");
}

#[test]
fn that_a_job_lost_its_forks_is_not_forgotten_by_who_clears_up() {
    let cli = Cli::new();
    let args = ["-v", "v", "-p", "c"];
    let lose = || {
        cli.attach("1", &args);
        fs::write(cli.path("c/first"), "half").unwrap();
        cli.kill_daemon();
        assert_eq!(cli.stale(), serde_json::json!(["1"]));
        assert_eq!(cli.stale(), serde_json::json!([]));
        assert!(!cli.path("c").exists(), "the path is free");
    };
    lose();
    let strict = ["finish", "--strict", "--job", "1", "--status", "0"];
    let (status, line) = cli.fails(&strict);
    let lost = "nothing is committed: the forks of job 1 were lost";
    assert!(status == 1 && line.contains(lost), "{line}");
    lose();
    // As the hooks of its next step do, which begin with clearing up.
    let hit = cli.attach("1", &args)["hit"].clone();
    fs::write(cli.path("c/second"), "half").unwrap();
    let ended = cli.call(&["finish", "--job", "1", "--status", "0"]);
    let said = String::from_utf8(ended.stderr).unwrap();
    assert!(hit == "empty" && said.contains(lost), "{said}");
    assert!(cli.numbers("v").is_empty());
    // A later job of that name is another one.
    lose();
    cli.change_job("1", |job| job["created"] = 0.into());
    assert_eq!(cli.stale(), serde_json::json!(["1"]));
    cli.attach("1", &args);
    assert_eq!(cli.finish("1", "0")["v"], "committed as v@1");
}

#[test]
fn a_job_that_is_attached_twice_at_once_is_one() {
    let cli = Cli::new();
    let attach = || {
        let args = ["attach", "--strict", "--job", "1", "-v", "v", "-p", "c"];
        let mut command = cli.command(&args);
        let piped = command.stdout(Stdio::null()).stderr(Stdio::piped());
        piped.spawn().unwrap()
    };
    for child in [attach(), attach(), attach(), attach()] {
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && !said.contains("lost"), "{said}");
    }
    fs::write(cli.path("c/f"), "whole").unwrap();
    assert_eq!(cli.finish("1", "0")["v"], "committed as v@1");
}

#[test]
fn a_volume_that_cannot_be_added_takes_nothing_from_the_others() {
    let cli = Cli::new();
    cli.attach("1", &["-v", "v", "-p", "c"]);
    fs::write(cli.path("c/f"), "whole").unwrap();
    fs::write(cli.path("file"), "in the way").unwrap();
    let add = ["attach", "--job", "1", "--add", "--strict"];
    for _ in 0..2 {
        let (status, line) = cli.fails(&[&add[..], &["-v", "w", "-p", "file"]].concat());
        assert!(status == 1 && line.contains("file"), "{status} {line}");
        assert_eq!(cli.json(&["forks"])["forks"].as_array().unwrap().len(), 1);
    }
    assert_eq!(cli.finish("1", "0")["v"], "committed as v@1");
}

#[test]
fn the_same_path_of_another_folder_is_another_path() {
    let cli = Cli::new();
    let attach = |folder: &str| {
        fs::create_dir(cli.path(folder)).unwrap();
        let mut command = cli.command(&["attach", "--job", "1", "-v", "v", "-p", "c"]);
        command.current_dir(cli.path(folder)).output().unwrap()
    };
    assert!(attach("web").status.success());
    let second = attach("api");
    let said = String::from_utf8(second.stderr).unwrap();
    assert!(
        second.status.code() == Some(2) && said.contains("other volumes, paths"),
        "{said}"
    );
    assert!(cli.path("web/c").is_dir() && !cli.path("api/c").exists());
    cli.finish("1", "1");
}

#[test]
fn a_fork_that_is_abandoned_takes_the_paths_of_its_job_with_it() {
    let cli = Cli::new();
    fs::create_dir(cli.path("hidden")).unwrap();
    fs::write(cli.path("hidden/own"), "of the checkout").unwrap();
    let args = ["-v", "v", "-p", "c", "-p", "hidden"];
    cli.attach("1", &args);
    cli.ok(&["abandon", "--all"]);
    let own = fs::read_to_string(cli.path("hidden/own")).unwrap();
    assert_eq!(own, "of the checkout");
    assert!(fs::read_dir(cli.path("c")).unwrap().next().is_none());
    cli.finish("1", "0");
    assert!(!cli.path("c").exists());
}

#[test]
fn without_a_cache_the_job_goes_on_unless_it_is_strict() {
    let cli = Cli::new();
    fs::create_dir(cli.path("store")).unwrap();
    fs::write(cli.path("store/precious"), "no store of ours").unwrap();
    let attached = cli.attach("1", &["-v", "v", "-p", "c"]);
    assert_eq!(
        (&attached["degraded"], &attached["hit"]),
        (&true.into(), &"empty".into())
    );
    assert!(cli.path("c").is_dir(), "an empty folder is there instead");
    let path = &attached["volumes"][0]["paths"][0]["path"];
    assert!(Path::new(path.as_str().unwrap()).is_absolute(), "{path}");
    cli.ok(&["finish", "--job", "1", "--status", "0"]);
    let (status, line) = cli.fails(&["attach", "--strict", "--job", "1", "-v", "v", "-p", "c"]);
    assert_eq!(status, 1, "{line}");
    assert!(line.contains("not a store"), "{line}");
}

#[test]
fn a_second_job_is_refused_the_path_of_the_first_and_told_whose_it_is() {
    let cli = Cli::new();
    cli.attach("1", &["-v", "v", "-p", "c"]);
    let second = cli.attach("2", &["-v", "v", "-p", "c"]);
    let why = second["volumes"][0]["degraded"].as_str().unwrap();
    assert!(why.contains("is attached by job 1"), "{why}");
    let third = cli.attach("3", &["-v", "w", "-p", "c", "-p", "d"]);
    assert_eq!(third["degraded"], true);
    assert!(cli.path("d").is_dir(), "an empty folder is there instead");
    cli.finish("3", "0");
    assert!(!cli.path("d").exists());
    let (status, _) = cli.fails(&["attach", "--job", "1", "-v", "other", "-p", "c"]);
    assert_eq!(status, 2, "the same job with other volumes");
    assert_eq!(cli.finish("2", "0")["v"], "not committed");
    assert_eq!(cli.finish("1", "0")["v"], "committed as v@1");
}

#[test]
fn of_jobs_that_attach_one_path_at_once_one_has_it_and_the_others_are_told() {
    let cli = Cli::new();
    cli.json(&["volumes"]);
    for round in 0..6 {
        let jobs = ["1", "2", "3"];
        let attached = std::thread::scope(|scope| {
            let attach = |job| {
                let cli = &cli;
                scope.spawn(move || cli.attach(job, &["-v", job, "-p", "c"]))
            };
            let threads = jobs.map(attach);
            threads.map(|thread| thread.join().unwrap())
        });
        let has = |n: &usize| attached[*n]["degraded"] == false;
        let having: Vec<usize> = (0..jobs.len()).filter(has).collect();
        assert_eq!(having.len(), 1, "round {round}: {attached:?}");
        let has = jobs[having[0]];
        let named = format!("is attached by job {has}");
        for other in attached.iter().filter(|a| a["degraded"] == true) {
            let why = other["volumes"][0]["degraded"].as_str().unwrap();
            assert!(why.contains(&named), "round {round}: {why}");
        }
        fs::write(cli.path("c/f"), has).unwrap();
        for job in jobs {
            cli.finish(job, "0");
        }
        assert_eq!(cli.ok(&["cat", &format!("{has}:f")]), has);
        // Who made the folder may have ended while the other was in it.
        if let Err(error) = fs::remove_dir(cli.path("c")) {
            let kind = error.kind();
            assert_eq!(kind, std::io::ErrorKind::NotFound, "round {round}");
        }
    }
}

#[test]
fn what_lies_in_the_path_of_a_job_is_refused_to_others_and_given_to_itself() {
    let cli = Cli::new();
    cli.attach("1", &["-v", "v", "-p", "o"]);
    cli.attach(
        "1",
        &["--add", "-v", "l", "-p", "link", "--link", "symlink"],
    );
    for path in ["o/sub", "link/sub"] {
        let (status, why) = cli.fails(&["attach", "--strict", "--job", "2", "-v", "w", "-p", path]);
        assert_eq!(status, 15, "{why}");
        assert!(why.contains("is attached by job 1"), "{why}");
        assert!(!cli.path(path).exists(), "nothing was made in it");
    }
    cli.attach("1", &["--add", "-v", "w", "-p", "o/sub"]);
    fs::write(cli.path("o/sub/f"), "x").unwrap();
    let done = cli.finish("1", "0");
    assert_eq!(done["w"], "committed as w@1");
    assert_eq!(cli.ok(&["cat", "w:f"]), "x");
}

#[test]
fn a_job_that_was_told_to_go_without_has_an_empty_folder_and_commits_nothing() {
    let cli = Cli::new();
    cli.attach("0", &["-v", "v", "-p", "c"]);
    fs::write(cli.path("c/f"), "kept").unwrap();
    cli.finish("0", "0");
    let empty = |path: &str| fs::read_dir(cli.path(path)).unwrap().next().is_none();
    for round in 0..4 {
        for ms in 2..=25 {
            let deadline = format!("{ms}ms");
            let link = ["bind", "symlink"][round % 2];
            let asked = ["-v", "v", "-p", "c", "-v", "w", "-p", "d"];
            let how = ["--link", link, "--deadline", &deadline];
            let attached = cli.attach("1", &[&asked[..], &how].concat());
            let without = attached["degraded"] == true;
            if without {
                let said = format!("round {round}, {deadline}: {attached}");
                assert!(empty("c") && empty("d"), "{said}");
                fs::write(cli.path("c/f"), "of a job without a cache").unwrap();
                fs::write(cli.path("d/f"), "of a job without a cache").unwrap();
            }
            let done = cli.finish("1", "0");
            let committed =
                |volume: &str| done[volume].as_str().is_some_and(|d| d != "not committed");
            assert!(
                !without || !(committed("v") || committed("w")),
                "{attached}: {done}"
            );
            for path in ["c", "d"] {
                let left = fs::remove_dir_all(cli.path(path));
                assert!(without || left.is_err(), "round {round}, {deadline}");
            }
        }
    }
    assert_eq!(cli.ok(&["cat", "v:f"]), "kept");
    let log = cli.json(&["log", "v"]);
    assert_eq!(log["versions"].as_array().unwrap().len(), 1, "{log}");
}

#[test]
fn a_path_may_be_a_link_but_never_node_modules_and_content_may_seed_an_empty_volume() {
    let cli = Cli::new();
    cli.attach("1", &["-v", "v", "-p", "l", "--link", "symlink"]);
    assert!(fs::symlink_metadata(cli.path("l")).unwrap().is_symlink());
    fs::write(cli.path("l/f"), "x").unwrap();
    assert_eq!(cli.finish("1", "0")["v"], "committed as v@1");
    assert!(fs::symlink_metadata(cli.path("l")).is_err());
    let (status, _) = cli.fails(&[
        "attach",
        "--strict",
        "--job",
        "2",
        "-v",
        "v",
        "-p",
        "node_modules",
        "--link",
        "symlink",
    ]);
    assert_eq!(status, 14);

    fs::create_dir(cli.path("full")).unwrap();
    fs::write(cli.path("full/seed"), "seed").unwrap();
    let (status, _) = cli.fails(&[
        "attach",
        "--strict",
        "--job",
        "3",
        "-v",
        "w",
        "-p",
        "full",
        "--existing",
        "fail",
    ]);
    assert_eq!(status, 1);
    cli.attach("3", &["-v", "w", "-p", "full", "--existing", "seed"]);
    assert_eq!(cli.finish("3", "0")["w"], "committed as w@1");
    assert_eq!(cli.ok(&["cat", "w:seed"]), "seed");
}

#[test]
fn the_folder_that_a_link_took_the_place_of_is_there_again_when_it_goes() {
    let cli = Cli::new();
    cli.attach("0", &["-v", "v", "-p", "c"]);
    fs::write(cli.path("c/there"), "a file has the name of a folder").unwrap();
    cli.finish("0", "0");
    fs::create_dir(cli.path("own")).unwrap();
    let link = ["--link", "symlink", "-p", "own", "-p", "made"];
    let is_folder = |path: &str| fs::symlink_metadata(cli.path(path)).is_ok_and(|m| m.is_dir());
    for (volume, last, degraded) in [("v", "there", true), ("w", "third", false)] {
        let args = [&["-v", volume], &link[..], &["-p", last]].concat();
        assert_eq!(cli.attach("1", &args)["degraded"], degraded);
        for path in ["own", "made", last] {
            assert_eq!(is_folder(path), degraded, "{path} of {volume}");
        }
        cli.finish("1", "0");
        assert!(is_folder("own"), "{volume}: it had been there");
        for path in ["made", last] {
            assert!(fs::symlink_metadata(cli.path(path)).is_err(), "{path}");
        }
    }
}

#[test]
fn a_job_that_runs_is_not_stale_for_who_sees_neither_its_mounts_nor_its_processes() {
    let cli = Cli::new();
    let mut agent = Command::new("sleep").arg("600").spawn().unwrap();
    let pid = agent.id().to_string();
    cli.attach("1", &["-v", "v", "-p", "c", "--agent-pid", &pid]);
    fs::write(cli.path("c/f"), "kept").unwrap();
    let program = env!("CARGO_BIN_EXE_forkvol");
    let script = format!("umount c && umount mounts/1/v && {program} finish --stale");
    let container = Command::new("unshare")
        .args([
            "-m",
            "-p",
            "-f",
            "--mount-proc",
            "--propagation",
            "private",
            "sh",
            "-c",
            &script,
        ])
        .env("FORKVOL_STORE", cli.path("store"))
        .current_dir(cli.dir.path())
        .status()
        .unwrap();
    assert!(container.success());
    agent.kill().unwrap();
    agent.wait().unwrap();
    assert_eq!(cli.finish("1", "0")["v"], "committed as v@1");
    assert_eq!(cli.ok(&["cat", "v:f"]), "kept");
}

#[test]
fn a_mount_root_that_is_no_whole_path_means_the_same_from_everywhere() {
    let cli = Cli::new();
    let args = ["-v", "v", "-p", "a/b/link", "--link", "symlink"];
    let start = ["attach", "--job", "1", "--mount-root", "relative"];
    cli.ok(&[&start[..], &args].concat());
    fs::write(cli.path("a/b/link/f"), "x").unwrap();
    let mut finish = cli.command(&["finish", "--job", "1", "--status", "0"]);
    assert!(finish.current_dir("/").status().unwrap().success());
    assert_eq!(cli.ok(&["cat", "v:f"]), "x");
    assert!(!cli.path("relative/1").exists());
}

#[test]
fn a_read_only_volume_without_a_folder_for_a_path_leaves_the_path_as_it_is() {
    let cli = Cli::new();
    cli.attach("1", &["-v", "v", "-p", "a", "-p", "b"]);
    fs::write(cli.path("a/f"), "x").unwrap();
    cli.finish("1", "0");
    let args = ["-v", "v", "-p", "a", "-p", "new", "--read-only"];
    let attached = cli.attach("2", &args);
    assert_eq!(
        (&attached["degraded"], &attached["hit"]),
        (&false.into(), &"exact".into())
    );
    assert_eq!(fs::read_to_string(cli.path("a/f")).unwrap(), "x");
    assert!(fs::write(cli.path("a/f"), "y").is_err());
    fs::write(cli.path("new/f"), "of the job").unwrap();
    assert_eq!(cli.finish("2", "0")["v"], "not committed");
    assert_eq!(fs::read_to_string(cli.path("new/f")).unwrap(), "of the job");
    let run = [
        "run",
        "-v",
        "v",
        "-p",
        "a",
        "-p",
        "newer",
        "--read-only",
        "--",
        "cat",
        "a/f",
    ];
    assert_eq!(cli.ok(&run), "x");
}

#[test]
fn other_statuses_than_0_commit_only_where_they_were_named() {
    let cli = Cli::new();
    for (status, success, head) in [
        ("3", "2,4", serde_json::Value::Null),
        ("4", "2,4", 1.into()),
    ] {
        cli.attach("1", &["-v", "v", "-p", "c"]);
        fs::write(cli.path("c/f"), status).unwrap();
        cli.ok(&[
            "finish",
            "--job",
            "1",
            "--status",
            status,
            "--success",
            success,
        ]);
        assert_eq!(cli.json(&["volume", "show", "v"])["volume"]["head"], head);
    }
    let path = cli.path("c");
    let output = cli.call(&[
        "run",
        "--success",
        "7",
        "-v",
        "v",
        "-p",
        path.to_str().unwrap(),
        "--",
        "bash",
        "-c",
        "rm c/f; exit 7",
    ]);
    assert_eq!(
        output.status.code(),
        Some(7),
        "the status stays the command's"
    );
    assert_eq!(cli.ok(&["ls", "v"]), "");
}

#[test]
fn a_job_ends_with_one_line_that_says_what_it_cost_and_brought() {
    let cli = Cli::new();
    cli.attach("1", &["-v", "v", "-p", "c"]);
    fs::write(cli.path("c/f"), vec![7; 100_000]).unwrap();
    let output = cli.call(&["finish", "--job", "1", "--status", "0"]);
    let text = String::from_utf8(output.stderr).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 1, "{text}");
    for part in [
        "job 1: v (empty hit, forked in ",
        " ms, 0 B read, ",
        "KiB written) committed as v@1, ",
        " newly stored",
    ] {
        assert!(lines[0].contains(part), "{part} in {text}");
    }
}

#[test]
fn what_is_committed_in_mid_job_stays_whatever_becomes_of_the_job() {
    let cli = Cli::new();
    cli.attach("1", &["-v", "v", "-p", "c", "-v", "w", "-p", "d"]);
    fs::write(cli.path("c/f"), "installed").unwrap();
    fs::write(cli.path("d/f"), "installed").unwrap();
    assert_eq!(cli.ok(&["commit", "--keep", "./c"]), "v@1");
    fs::write(cli.path("c/f"), "tested").unwrap();
    cli.finish("1", "1");
    assert_eq!(cli.ok(&["cat", "v:f"]), "installed");
    assert!(cli.json(&["volume", "show", "w"])["volume"]["head"].is_null());

    let both = ["-v", "v", "-p", "c", "-v", "w", "-p", "d"];
    cli.attach("2", &both);
    fs::write(cli.path("c/f"), "installed again").unwrap();
    fs::write(cli.path("d/f"), "installed").unwrap();
    let keep = ["finish", "--job", "2", "--keep", "--status", "0"];
    let done = cli.json(&keep)["finish"]["volumes"].clone();
    assert_eq!(
        (&done["v"], &done["w"]),
        (&"committed as v@2".into(), &"committed as w@1".into())
    );
    fs::write(cli.path("c/f"), "tested").unwrap();
    assert_eq!(cli.finish("2", "1")["v"], "abandoned");
    assert_eq!(cli.ok(&["cat", "v:f"]), "installed again");
}

#[test]
fn what_is_excluded_is_in_no_version_and_named_at_the_end() {
    let cli = Cli::new();
    let args = [
        "-v",
        "v",
        "-p",
        "c",
        "--exclude",
        "*.tmp",
        "--exclude",
        "!keep.tmp",
    ];
    cli.attach("1", &args);
    for name in ["f", "x.tmp", "keep.tmp", ".npmrc"] {
        fs::write(cli.path("c").join(name), name).unwrap();
    }
    let output = cli.call(&["finish", "--job", "1", "--status", "0"]);
    let talk = String::from_utf8(output.stderr).unwrap();
    assert!(talk.contains("in no version: 2 (.npmrc, x.tmp)"), "{talk}");
    let names = || {
        let listed = cli.json(&["ls", "v"]);
        let entries = listed["entries"].as_array().unwrap().iter();
        let mut names: Vec<String> = entries
            .map(|e| e["name"].as_str().unwrap().to_owned())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names(), ["f", "keep.tmp"]);
    let excluded = &cli.json(&["log", "v"])["versions"][0]["excluded"];
    assert_eq!(excluded["count"], 2, "{excluded}");
    let run = ["run", "--no-default-exclude", "-v", "v", "-p", "c", "--"];
    let output = cli.call(&[&run[..], &["sh", "-c", "touch c/.npmrc c/x.tmp"]].concat());
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        said.starts_with("forkvol: v (") && said.lines().count() == 1,
        "{said}"
    );
    assert_eq!(names(), [".npmrc", "f", "keep.tmp", "x.tmp"]);
}

#[test]
fn files_belong_to_whoever_calls_where_that_was_asked_for() {
    let cli = Cli::new();
    let owner = |of: &str, script: &str| {
        let args = [
            "run", "--owner", of, "-v", "v", "-p", "c", "--", "sh", "-ec", script,
        ];
        cli.ok(&args)
    };
    owner(
        "keep",
        "umask 077; echo 1 > c/f; echo 1 > c/g; mkdir -m 2777 c/d; cp /bin/true c/suid; chmod 4755 c/suid",
    );
    // A job under another id reads and writes what root alone could, and cannot give it away.
    let job = "setpriv --reuid 4242 --regid 4242 --clear-groups sh -ec \
        'cat c/f; echo 2 > c/f; echo 2 > c/h; echo 2 > c/d/i; chmod 4755 c/suid'; chown 1 c/h 2>&1 | grep -o 'not permitted'; stat -c %u:%g c c/f c/g c/h";
    assert_eq!(
        owner("4242:4242", job),
        "1\nnot permitted\n4242:4242\n4242:4242\n4242:4242\n4242:4242"
    );
    let stored = "stat -c %u:%g c/f c/g c/h c/d/i c/suid; cat c/f";
    assert_eq!(
        owner("keep", stored),
        "4242:4242\n0:0\n4242:4242\n4242:4242\n4242:4242\n2"
    );
    assert_eq!(owner("caller", stored), "0:0\n0:0\n0:0\n0:0\n0:0\n2");
}

#[test]
fn containers_of_an_engine_outside_are_said_not_to_see_the_fork() {
    let cli = Cli::new();
    cli.json(&["volumes"]);
    let socket = cli.path("engine.sock");
    let _engine = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let told = |entering: &[&str]| {
        let program = env!("CARGO_BIN_EXE_forkvol");
        let script = format!(
            "{program} attach --job 1 --mount-root mounts -v v -p c --env-file env; {program} finish --job 1 --status 1"
        );
        let output = Command::new("env")
            .args(entering)
            .args(["sh", "-ec", &script])
            .env("FORKVOL_STORE", cli.path("store"))
            .env("DOCKER_HOST", format!("unix://{}", socket.display()))
            .current_dir(cli.dir.path())
            .output()
            .unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let apart = ["unshare", "--mount", "--propagation"];
    let talk = told(&[&apart[..], &["private"]].concat());
    let line = format!("will not see {}", cli.path("c").display());
    assert!(talk.contains(&line) && talk.contains("rshared"), "{talk}");
    for seen in [&[&apart[..], &["shared"]].concat()[..], &[]] {
        let talk = told(seen);
        assert!(!talk.contains("will not see"), "{talk}");
    }
    // In a container of its own pid namespace the engine has no number.
    let contained = ["unshare", "--mount", "--pid", "--fork", "--mount-proc"];
    let talk = told(&[&contained[..], &["--propagation", "private"]].concat());
    assert!(talk.contains(&line), "{talk}");
}

#[test]
fn the_checkout_may_be_a_fork_but_is_never_hidden_by_one() {
    let cli = Cli::new();
    let work = cli.path("work");
    fs::create_dir(&work).unwrap();
    let mounts = cli.path("mounts");
    let attach = |job: &str, root: &Path| {
        let args = [
            "attach", "--strict", "--job", job, "-v", "v", "-p", ".", "--json",
        ];
        let mut command = cli.command(&args);
        command
            .arg("--mount-root")
            .arg(root)
            .current_dir(&work)
            .output()
            .unwrap()
    };
    assert!(attach("1", &mounts).status.success(), "before the checkout");
    fs::write(work.join("checked-out"), "x").unwrap();
    assert_eq!(cli.finish("1", "0")["v"], "committed as v@1");
    fs::write(work.join("source"), "precious").unwrap();
    let said = |output: Output| {
        assert_eq!(output.status.code(), Some(14));
        String::from_utf8(output.stderr).unwrap()
    };
    let line = said(attach("2", &mounts));
    assert!(line.contains("a fork before the checkout"), "{line}");
    let mut run = cli.command(&["run", "--strict", "-v", "v", "-p", ".", "--", "true"]);
    let run = run.current_dir(&work).output().unwrap();
    assert!(!run.status.success());
    let line = String::from_utf8(run.stderr).unwrap();
    assert!(line.contains("a fork before the checkout"), "{line}");
    assert!(work.join("source").exists());
    fs::remove_file(work.join("source")).unwrap();
    let line = said(attach("2", &work.join("mounts")));
    assert!(line.contains("choose another --mount-root"), "{line}");
}

#[test]
fn an_end_that_was_killed_behind_its_commit_is_brought_to_its_end_by_the_next() {
    let cli = Cli::new();
    // How far the first one came with putting things back.
    for (content, unmounted) in [("1", &[][..]), ("2", &["d"]), ("3", &["d", "c"])] {
        cli.attach("1", &["-v", "v", "-p", "c", "-v", "w", "-p", "d"]);
        fs::write(cli.path("c/f"), content).unwrap();
        fs::write(cli.path("d/f"), content).unwrap();
        cli.only_in_the_daemon(commit);
        for path in unmounted {
            let unmounted = Command::new("umount").arg(cli.path(path)).status();
            assert!(unmounted.unwrap().success());
        }
        let done = cli.finish("1", "0");
        let before = serde_json::Value::from("ended before");
        assert_eq!(
            (&done["v"], &done["w"]),
            (&before, &before),
            "{unmounted:?}"
        );
        assert!(!cli.path("c").exists() && !cli.path("d").exists());
        assert!(cli.finish("1", "0").is_null());
        for volume in ["v", "w"] {
            assert_eq!(cli.ok(&["cat", &format!("{volume}:f")]), content);
        }
    }
}

fn commit(forks: Vec<String>) -> Request {
    let forks = forks.into_iter().map(|fork| (fork, When::Always));
    Request::Commit(Commit::of(forks))
}

#[test]
fn a_job_whose_end_was_cut_off_is_not_attached_as_if_it_went_on() {
    let cli = Cli::new();
    let args = ["-v", "v", "-p", "c"];
    cli.attach("1", &args);
    fs::write(cli.path("c/f"), "half").unwrap();
    // It had said how the job ended, and the daemon does not commit yet.
    cli.change_job("1", |job| job["end"] = "success".into());
    assert_eq!(cli.attach("1", &args)["hit"], "empty");
    assert!(!cli.path("c/f").exists());
    assert_eq!(cli.json(&["forks"])["forks"].as_array().unwrap().len(), 1);
    cli.finish("1", "1");
}

#[test]
fn a_volume_whose_adding_was_cut_off_takes_nothing_from_the_others() {
    let cli = Cli::new();
    cli.attach("1", &["-v", "a", "-p", "a"]);
    fs::write(cli.path("a/f"), "kept").unwrap();
    cli.attach("1", &["--add", "-v", "b", "-p", "b"]);
    // It was still being seeded: noted, and not in its place.
    cli.change_job("1", |job| {
        let asked = job["asked"].as_str().unwrap();
        job["asked"] = asked.split_inclusive('\n').next().into();
    });
    let unmounted = Command::new("umount").arg(cli.path("b")).status().unwrap();
    assert!(unmounted.success());
    let done = cli.finish("1", "0");
    assert_eq!(done["a"], "committed as a@1");
    assert_eq!(done["b"], "not committed");
    assert_eq!(cli.ok(&["cat", "a:f"]), "kept");
}

#[test]
fn a_mount_that_was_not_noted_goes_with_its_job_though_it_is_served() {
    let cli = Cli::new();
    for is_over in [true, false] {
        cli.attach("1", &["-v", "v", "-p", "c"]);
        let root = cli.path("mounts/1/v");
        assert_eq!(mounts_at(&root), 1);
        let unmounted = Command::new("umount").arg(cli.path("c")).status().unwrap();
        assert!(unmounted.success());
        if is_over {
            cli.only_in_the_daemon(|forks| Request::Abandon { forks });
        }
        cli.change_job("1", |job| {
            job["asked"] = "".into();
            job["volumes"][0]["mount"] = serde_json::Value::Null;
            job["volumes"][0]["paths"][0]["link"] = serde_json::Value::Null;
        });
        cli.finish("1", "0");
        assert_eq!(mounts_at(&root), 0, "over: {is_over}");
        assert!(!root.exists() && !cli.path("c").exists());
    }
}

#[test]
fn what_is_mounted_elsewhere_goes_with_the_job_that_is_committed() {
    let cli = Cli::new();
    cli.attach("1", &["-v", "v", "-p", "c"]);
    fs::write(cli.path("c/f"), "kept").unwrap();
    cli.change_job("1", |job| {
        let volume = &mut job["volumes"][0];
        volume["paths"] = serde_json::json!([]);
        volume["mount"] = serde_json::Value::Null;
        volume["folder"] = serde_json::Value::Null;
    });
    assert_eq!(cli.finish("1", "0")["v"], "committed as v@1");
    assert_eq!(mounts_at(&cli.path("mounts/1/v")), 0);
    assert_eq!(mounts_at(&cli.path("c")), 0);
}

#[test]
fn stale_jobs_are_ended_whatever_becomes_of_another() {
    let cli = Cli::new();
    let other_boot = |job: &mut serde_json::Value| job["boot"] = "another".into();
    for job in ["1", "2", "3"] {
        cli.attach(job, &["-v", job, "-p", job]);
        cli.change_job(job, other_boot);
    }
    let lock = fs::File::create(cli.path("store/jobs/1.lock")).unwrap();
    lock.lock().unwrap();
    // This one cannot be locked at all.
    fs::create_dir(cli.path("store/jobs/2.lock")).unwrap();
    let output = cli.call(&["finish", "--stale", "--json"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["stale"], serde_json::json!(["3"]), "{said}");
    assert_eq!(document["failed"], serde_json::json!(["2"]), "{said}");
    assert!(said.contains("warning: job 2 stays"), "{said}");
    drop(lock);
    assert_eq!(cli.stale(), serde_json::json!(["1"]));
    let strict = cli.call(&["finish", "--stale", "--strict"]);
    assert_eq!(strict.status.code(), Some(1));
    fs::remove_dir(cli.path("store/jobs/2.lock")).unwrap();
    assert_eq!(cli.stale(), serde_json::json!(["2"]));
}

#[test]
fn what_killed_commands_leave_is_removed_and_what_is_in_use_stays() {
    let cli = Cli::new();
    cli.attach("1", &["-v", "v", "-p", "c"]);
    let jobs = cli.path("store/jobs");
    for name in [
        "1.lock",
        "gone.lock",
        "held.lock",
        ".1.17",
        ".gone.17",
        ".held.17",
    ] {
        fs::write(jobs.join(name), "").unwrap();
    }
    let held = fs::File::open(jobs.join("held.lock")).unwrap();
    held.lock().unwrap();
    let temporary = cli.path("tmp");
    let folder = |name: &str| temporary.join(format!("forkvol-run-{name}"));
    for name in ["left/0", "new/0", "held/0", "full/0/x", "used/0"] {
        fs::create_dir_all(folder(name)).unwrap();
    }
    let long_ago = std::time::SystemTime::now() - Duration::from_secs(25 * 3600);
    for name in ["left", "held", "full", "used"] {
        let folder = fs::File::open(folder(name)).unwrap();
        folder.set_modified(long_ago).unwrap();
    }
    let run = fs::File::open(folder("held")).unwrap();
    run.lock().unwrap();
    // Out of sight, where what is mounted would go with its folder.
    let script = "mount -t tmpfs none \"$0\" && echo mounted && exec sleep 600";
    let mut other = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", script])
        .arg(folder("used/0"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = [0; 7];
    std::io::Read::read_exact(other.stdout.as_mut().unwrap(), &mut said).unwrap();
    let mut command = cli.command(&["finish", "--stale"]);
    let output = command.env("TMPDIR", &temporary).output().unwrap();
    other.kill().unwrap();
    other.wait().unwrap();
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{output:?}"
    );
    let names = |folder: &Path| {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names(&jobs), [".held.17", "1.json", "held.lock"]);
    let kept = ["full", "held", "new", "used"].map(|name| format!("forkvol-run-{name}"));
    assert_eq!(names(&temporary), kept);
    assert!(folder("full/0/x").exists() && folder("used/0").exists());
}

#[test]
fn volumes_that_are_added_to_a_job_are_committed_with_it_as_one() {
    let cli = Cli::new();
    let first = ["-v", "a", "-p", "a", "--label", "k=1"];
    let second = ["--add", "-v", "b", "-p", "b"];
    cli.attach("1", &first);
    let refused = |args: &[&str]| cli.fails(&[&["attach", "--job", "1"], args].concat());
    assert_eq!(refused(&second[1..]).0, 2, "only where it is said");
    assert_eq!(refused(&["--add", "-v", "a", "-p", "other"]).0, 2);
    assert_eq!(refused(&["--add", "-v", "A", "-p", "A"]).0, 2);
    let both = cli.attach("1", &second);
    assert_eq!(both["volumes"].as_array().unwrap().len(), 2);
    let first_again = [&["--add"], &first[..]].concat();
    for again in [&second[..], &first_again] {
        assert_eq!(cli.attach("1", again), both, "it has them already");
    }
    fs::write(cli.path("a/f"), "a").unwrap();
    fs::write(cli.path("b/f"), "b").unwrap();
    let done = cli.finish("1", "0");
    assert_eq!(done["a"], "committed as a@1");
    assert_eq!(done["b"], "committed as b@1");

    cli.attach("2", &first_again);
    cli.attach("2", &second);
    fs::write(cli.path("a/f"), "lost").unwrap();
    fs::remove_file(cli.path("b/f")).unwrap();
    assert_eq!(cli.finish("2", "0")["a"], "abandoned");
    assert_eq!(cli.ok(&["cat", "a:f"]), "a");
}

/// Whether something is mounted at a path, and how often.
fn mounts_at(path: &Path) -> usize {
    let mounts = forkvol::sys::mount::mounts().unwrap();
    mounts.iter().filter(|mount| mount.path == path).count()
}

#[test]
fn what_is_left_of_a_job_does_not_touch_the_path_that_another_one_has_now() {
    let cli = Cli::new();
    for (round, late) in [
        &["finish", "--job", "1", "--status", "0"][..],
        &["finish", "--stale"],
    ]
    .into_iter()
    .enumerate()
    {
        cli.attach("1", &["-v", "v", "-p", "c"]);
        cli.ok(&["abandon", "--all"]);
        // The kernel gives it the number that the first one had.
        cli.attach("2", &["-v", "v", "-p", "c"]);
        cli.ok(late);
        assert_eq!(mounts_at(&cli.path("c")), 1, "{late:?}");
        fs::write(cli.path("c/f"), late.join(" ")).unwrap();
        let version = format!("committed as v@{}", round + 1);
        assert_eq!(cli.finish("2", "0")["v"], version.as_str());
        assert_eq!(cli.ok(&["cat", "v:f"]), late.join(" "));
        let jobs = cli.json(&["jobs"])["jobs"].clone();
        match round {
            0 => assert_eq!(jobs, serde_json::json!([])),
            _ => assert_eq!(
                (&jobs[0]["state"], jobs.as_array().unwrap().len()),
                (&"lost".into(), 1)
            ),
        }
    }
}

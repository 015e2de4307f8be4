//! Forks that the steps of one build share.

use rustix::fs::inotify;

use super::*;

/// Joins a workspace; returns what attach says.
fn join(cli: &Cli, job: &str, more: &[&str]) -> serde_json::Value {
    let root = cli.path("mounts");
    let all = [
        &["attach", "--strict", "--join", "build-7", "--job", job][..],
        &["--mount-root", root.to_str().unwrap()],
        more,
    ]
    .concat();
    cli.json(&all)["attach"].clone()
}

fn forks(cli: &Cli) -> usize {
    cli.json(&["forks"])["forks"].as_array().unwrap().len()
}

/// Waits in another mount namespace, as a container would, until a file is there.
fn wait_inside(path: &Path) -> std::process::Child {
    let script = format!(
        "for n in $(seq 500); do [ -e {0} ] && exec cat {0}; sleep 0.02; done; exit 1",
        path.display()
    );
    Command::new("unshare")
        .args(["--mount", "bash", "-c", &script])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

#[test]
fn what_one_member_writes_another_sees_at_once() {
    let cli = Cli::new();
    join(&cli, "a", &["-v", "work", "-p", "a"]);
    join(&cli, "b", &["-v", "work", "-p", "deep/b"]);
    assert_eq!(forks(&cli), 1, "both are in one fork");
    let other = wait_inside(&cli.path("deep/b/signal"));
    let watch = inotify::init(inotify::CreateFlags::NONBLOCK).unwrap();
    inotify::add_watch(&watch, cli.path("deep/b"), inotify::WatchFlags::CREATE).unwrap();
    fs::write(cli.path("a/half"), "now").unwrap();
    fs::rename(cli.path("a/half"), cli.path("a/signal")).unwrap();
    let read = other.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&read.stdout), "now");
    let mut buffer = [std::mem::MaybeUninit::uninit(); 512];
    let mut events = inotify::Reader::new(&watch, &mut buffer);
    let event = events.next().unwrap();
    assert_eq!(
        event.file_name().unwrap().to_bytes(),
        b"half",
        "a watch tells of it"
    );
    assert_eq!(
        fs::metadata(cli.path("a/signal")).unwrap().len(),
        fs::metadata(cli.path("deep/b/signal")).unwrap().len()
    );
    cli.ok(&["finish", "--job", "a", "--status", "0"]);
    assert!(!cli.path("a").exists() && cli.path("deep/b/signal").exists());
    cli.ok(&["finish", "--job", "b", "--status", "0"]);
    assert!(!cli.path("deep").exists());
    cli.ok(&["finish", "--join", "build-7", "--status", "0"]);
    assert_eq!(
        (forks(&cli), cli.path("mounts/workspace.build-7").exists()),
        (0, false)
    );
    assert!(
        cli.json(&["volume", "show", "work"])["volume"]["head"].is_null(),
        "a build's workspace is thrown away"
    );
}

#[test]
fn the_workspace_of_a_pipeline_is_committed_at_its_end_without_credentials() {
    let cli = Cli::new();
    let both = ["-v", "both", "-p", "c", "-p", "d"];
    let pipeline = ["-v", "work", "-p", "a", "--lifetime", "pipeline"];
    join(&cli, "a", &[&pipeline[..], &both].concat());
    fs::write(cli.path("a/result"), "r").unwrap();
    fs::write(cli.path("d/.npmrc"), "//registry/:_authToken=secret").unwrap();
    fs::write(cli.path("d/f"), "x").unwrap();
    fs::write(cli.path("a/.npmrc"), "//registry/:_authToken=secret").unwrap();
    cli.ok(&["finish", "--job", "a", "--status", "0"]);
    join(&cli, "b", &["-v", "work", "-p", "b"]);
    assert!(
        cli.path("b/.npmrc").exists(),
        "it is passed on within the build"
    );
    cli.ok(&["finish", "--job", "b", "--status", "1"]);
    cli.ok(&["finish", "--join", "build-7", "--status", "0"]);
    let names = cli.ok(&["ls", "work"]);
    assert!(
        names.contains("result") && !names.contains(".npmrc"),
        "{names}"
    );
    let names = cli.ok(&["ls", "both:d"]);
    assert_eq!(names.split_whitespace().last(), Some("f"), "{names}");
    assert!(!names.contains(".npmrc"), "{names}");

    join(&cli, "a", &pipeline);
    fs::write(cli.path("a/result"), "of a build that fails").unwrap();
    cli.ok(&["finish", "--join", "build-7", "--outcome", "failure"]);
    assert_eq!(cli.ok(&["cat", "work:result"]), "r");
    assert!(
        !cli.path("a").exists(),
        "who was in it still has its place back"
    );
    assert_eq!(cli.json(&["jobs"])["jobs"], serde_json::json!([]));
}

#[test]
fn a_workspace_that_lost_its_daemon_goes_on_and_commits_nothing() {
    let cli = Cli::new();
    let pipeline = ["-v", "work", "-p", "a", "--lifetime", "pipeline"];
    join(&cli, "a", &pipeline);
    fs::write(cli.path("a/first"), "half").unwrap();
    cli.kill_daemon();
    join(&cli, "a", &pipeline);
    fs::write(cli.path("a/second"), "half").unwrap();
    let ended = cli.call(&["finish", "--join", "build-7", "--status", "0"]);
    let said = String::from_utf8(ended.stderr).unwrap();
    assert!(
        said.contains("nothing is committed: the forks of"),
        "{said}"
    );
    let head = cli.json(&["volume", "show", "work"])["volume"]["head"].clone();
    assert_eq!(head, serde_json::Value::Null);
}

#[test]
fn a_member_that_asked_to_read_only_cannot_write_and_others_can() {
    let cli = Cli::new();
    join(&cli, "a", &["-v", "work", "-p", "a"]);
    join(&cli, "b", &["-v", "work", "-p", "b", "--read-only"]);
    fs::write(cli.path("a/f"), "x").unwrap();
    assert_eq!(fs::read(cli.path("b/f")).unwrap(), b"x");
    let error = fs::write(cli.path("b/f"), "y").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(30), "read-only filesystem");
    fs::write(cli.path("a/f"), "z").unwrap();
    cli.ok(&["finish", "--join", "build-7", "--status", "0"]);
    assert!(!cli.path("a").exists() && !cli.path("b").exists());
}

#[test]
fn the_workspace_of_a_step_ends_with_its_last_member() {
    let cli = Cli::new();
    for job in ["a", "b"] {
        join(&cli, job, &["-v", "work", "-p", job, "--lifetime", "step"]);
    }
    cli.ok(&["finish", "--job", "a", "--status", "0"]);
    assert_eq!(forks(&cli), 1);
    cli.ok(&["finish", "--job", "b", "--status", "0"]);
    assert_eq!(forks(&cli), 0);
}

#[test]
fn a_workspace_that_nobody_was_in_for_an_hour_is_over() {
    let cli = Cli::new();
    join(&cli, "a", &["-v", "work", "-p", "a"]);
    let stale = || cli.json(&["finish", "--stale"])["stale"].clone();
    let an_hour_passes = || {
        cli.change_job("workspace.build-7", |job| {
            let touched = job["shared"]["touched"].as_u64().unwrap();
            job["shared"]["touched"] = (touched - 3601).into();
        });
    };
    an_hour_passes();
    assert_eq!(stale(), serde_json::json!([]), "somebody is in it");
    cli.ok(&["finish", "--job", "a", "--status", "0"]);
    assert_eq!(stale(), serde_json::json!([]), "somebody left it just now");
    an_hour_passes();
    assert_eq!(stale(), serde_json::json!(["workspace.build-7"]));
    assert_eq!(forks(&cli), 0);
}

#[test]
fn a_workspace_whose_first_join_was_cut_off_gets_its_volume_from_the_next() {
    let cli = Cli::new();
    join(&cli, "a", &["-v", "work", "-p", "a"]);
    cli.change_job("workspace.build-7", |job| {
        let mut half = job["volumes"][0].clone();
        half["volume"] = "more".into();
        for lacks in ["fork", "mount", "folder"] {
            half[lacks] = serde_json::Value::Null;
        }
        job["volumes"].as_array_mut().unwrap().push(half);
    });
    join(
        &cli,
        "b",
        &["-v", "work", "-p", "b", "-v", "more", "-p", "more"],
    );
    fs::write(cli.path("a/f"), "shared").unwrap();
    assert_eq!(fs::read_to_string(cli.path("b/f")).unwrap(), "shared");
    fs::write(cli.path("more/f"), "x").unwrap();
    assert_eq!(forks(&cli), 2);
    cli.ok(&["finish", "--join", "build-7", "--status", "0"]);
}

#[test]
fn shards_that_do_not_share_have_each_its_own_fork_of_the_seed() {
    let cli = Cli::new();
    let seeded = cli.run(
        "db",
        &cli.path("data"),
        "for n in {1..50}; do echo $n > data/$n; done",
    );
    assert!(seeded.status.success());
    for shard in 1..=4 {
        let (name, path) = (shard.to_string(), format!("shard{shard}"));
        let at = cli.path("mounts");
        cli.ok(&[
            "attach",
            "--strict",
            "--job",
            &name,
            "-v",
            "db",
            "-p",
            &path,
            "--mount-root",
            at.to_str().unwrap(),
        ]);
        fs::write(cli.path(&path).join("1"), &name).unwrap();
    }
    for shard in 1..=4 {
        let own = fs::read_to_string(cli.path(&format!("shard{shard}/1"))).unwrap();
        assert_eq!(own, shard.to_string());
        cli.ok(&["finish", "--job", &own, "--status", "1"]);
    }
    assert_eq!(cli.ok(&["cat", "db:1"]), "1");
}

/// Runs SQL on a server that lives as long as that, on the data folder `$1/pg`.
const SERVER: &str = r#"
    user() { (cd / && exec setpriv --reuid 65534 --regid 65534 --clear-groups env HOME=/ "$@"); }
    sql() {
      local data="$PWD/$1" socket="$PWD/socket-$1"
      mkdir -p "$socket" && chown 65534 "$socket"
      user postgres -D "$data/pg" -k "$socket" -c listen_addresses= -c shared_buffers=1MB > "$socket/log" 2>&1 &
      for n in $(seq 500); do psql -h "$socket" -U u -d postgres -Atqc 'select' 2> /dev/null && break; sleep 0.02; done
      psql -h "$socket" -U u -d postgres -Atq -v ON_ERROR_STOP=1 -c "$2"
      kill -INT "$(head -1 "$data/pg/postmaster.pid")"
      wait
    }
"#;

#[test]
fn a_database_is_seeded_once_and_each_of_four_shards_changes_its_own() {
    let there = Command::new("sh")
        .args(["-c", "command -v initdb postgres psql setpriv"])
        .output()
        .unwrap();
    if !there.status.success() {
        eprintln!("left out: no Postgres is installed");
        return;
    }
    let cli = Cli::new();
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(cli.dir.path(), open).unwrap();
    let bash = |script: &str| {
        let output = Command::new("bash")
            .args(["-euo", "pipefail", "-c", &format!("{SERVER}{script}")])
            .current_dir(cli.dir.path())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{script}: {text}");
        String::from_utf8(output.stdout).unwrap()
    };
    let attach = |job: &str, path: &str| {
        let all = ["attach", "--strict", "--job", job, "-v", "db", "-p", path];
        cli.ok(&[&all[..], &["--mount-root", "mounts"]].concat());
    };
    attach("seed", "seed");
    bash(
        "chown 65534 seed
         user initdb -D $PWD/seed/pg -A trust -U u > /dev/null
         sql seed 'create table t as select n from generate_series(1, 20000) n'",
    );
    cli.ok(&["finish", "--job", "seed", "--status", "0"]);

    let shards: Vec<String> = (1..=4).map(|n| format!("shard{n}")).collect();
    shards.iter().for_each(|shard| attach(shard, shard));
    std::thread::scope(|scope| {
        for (n, shard) in (1..).zip(&shards) {
            let bash = &bash;
            scope.spawn(move || {
                let sql = format!(
                    "update t set n = -{n}1 where n <= 1000; select count(*), min(n) from t"
                );
                assert_eq!(
                    bash(&format!("sql {shard} '{sql}'")),
                    format!("20000|-{n}1\n")
                );
            });
        }
    });
    let sum = "select count(*), count(distinct n), min(n) from t";
    for (n, shard) in (1..).zip(&shards) {
        let own = bash(&format!("sql {shard} '{sum}'"));
        assert_eq!(own, format!("20000|19001|-{n}1\n"), "after a restart");
        cli.ok(&["finish", "--job", shard, "--status", "1"]);
    }
    attach("last", "last");
    assert_eq!(bash(&format!("sql last '{sum}'")), "20000|20000|1\n");
    cli.ok(&["finish", "--job", "last", "--status", "0"]);
}

#[test]
fn a_workspace_that_is_there_has_its_own_lifetime_and_size() {
    let cli = Cli::new();
    let first = [
        "-v",
        "work",
        "-p",
        "a",
        "--lifetime",
        "stage",
        "--size",
        "1g",
    ];
    join(&cli, "a", &first);
    let joins = |more: &[&str]| {
        let root = cli.path("mounts");
        let line = ["attach", "--join", "build-7", "--job", "b", "--mount-root"];
        let line = [
            &line[..],
            &[root.to_str().unwrap(), "-v", "work", "-p", "b"],
            more,
        ]
        .concat();
        cli.fails(&line)
    };
    for (more, says) in [
        (
            &["--lifetime", "pipeline"][..],
            "has the lifetime stage already",
        ),
        (&["--size", "2g"], "has work with a size of 1.0 GiB already"),
    ] {
        let (code, text) = joins(more);
        assert!(code == 2 && text.contains(says), "{code} {text}");
        assert!(!cli.path("b").exists());
    }
    join(
        &cli,
        "b",
        &[
            "-v",
            "work",
            "-p",
            "b",
            "--lifetime",
            "stage",
            "--size",
            "1g",
        ],
    );
    for job in ["a", "b"] {
        cli.ok(&["finish", "--job", job, "--status", "0"]);
    }
    cli.ok(&["finish", "--join", "build-7", "--status", "0"]);
}

#[test]
fn steps_that_join_at_once_are_in_one_workspace() {
    let cli = Cli::new();
    let steps = ["a", "b", "c", "d", "e", "f"];
    let joining = steps.map(|step| {
        let options = ["--mount-root", "mounts", "-v", "work", "-p", step];
        let join = ["attach", "--strict", "--join", "w", "--job", step];
        let mut command = cli.command(&[&join[..], &options].concat());
        let piped = command.stdout(Stdio::null()).stderr(Stdio::piped());
        piped.spawn().unwrap()
    });
    for child in joining {
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
    }
    assert_eq!(forks(&cli), 1);
    for step in steps {
        fs::write(cli.path(&format!("{step}/of-{step}")), step).unwrap();
    }
    for step in steps {
        assert_eq!(fs::read_dir(cli.path(step)).unwrap().count(), steps.len());
    }
    cli.ok(&["finish", "--join", "w", "--status", "0"]);
}

#[test]
fn who_was_in_a_workspace_that_is_gone_holds_no_path_any_more() {
    let cli = Cli::new();
    join(&cli, "a", &["-v", "work", "-p", "a"]);
    cli.kill_daemon();
    let stale = cli.json(&["finish", "--stale"])["stale"].clone();
    assert_eq!(stale, serde_json::json!(["workspace.build-7"]));
    assert!(!cli.path("a").exists());
    cli.attach("b", &["-v", "own", "-p", "a"]);
    cli.finish("b", "0");
}

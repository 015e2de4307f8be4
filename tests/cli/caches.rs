//! Jobs whose volumes are named by files and by what lies in their folder.

use super::*;

impl Cli {
    pub fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    /// `attach` with variables of a CI host; forks are mounted below the test's own folder.
    fn attach_on(&self, variables: &[(&str, &str)], args: &[&str]) -> Output {
        let all = [&["attach", "--json", "--mount-root", "mounts"], args].concat();
        let mut command = self.command(&all);
        for name in [
            "BUILDKITE_STEP_KEY",
            "BUILDKITE_LABEL",
            "BUILDKITE_AGENT_CACHE_PATHS",
        ] {
            command.env_remove(name);
        }
        command
            .env("BUILDKITE_PIPELINE_SLUG", "shop")
            .envs(variables.iter().copied())
            .output()
            .unwrap()
    }

    /// What a job got: `VOLUME HIT`, in order.
    fn got(&self, job: &str, variables: &[(&str, &str)], args: &[&str]) -> Vec<String> {
        let output = self.attach_on(variables, &[&["--job", job], args].concat());
        let talk = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{talk}");
        let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let volumes = document["attach"]["volumes"].as_array().unwrap();
        assert_eq!(document["attach"]["degraded"], false, "{document}");
        let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
        let one = |v: &serde_json::Value| format!("{} {}", text(&v["volume"]), text(&v["hit"]));
        volumes.iter().map(one).collect()
    }

    fn end(&self, job: &str, status: &str) -> serde_json::Value {
        self.json(&["finish", "--job", job, "--status", status])["finish"]["volumes"].clone()
    }
}

#[test]
fn a_step_of_a_pipeline_has_its_volumes_and_those_of_the_root() {
    let cli = Cli::new();
    cli.write(
        "pipeline.yml",
        "cache: node_modules
steps:
  - {label: build, command: x, cache: .build}
  - {key: spec, command: x, cache: {paths: vendor/bundle, name: bundle, size: 30g}}
  - {key: bare, command: x, cache: false}
",
    );
    let pipeline = |step: &'static str| ["--pipeline", "pipeline.yml", "--step", step];
    let both = ["shop empty", "shop/bundle empty"];
    assert_eq!(cli.got("1", &[], &pipeline("spec")), both);
    let sizes = cli.json(&["forks"]);
    let size = |volume: &str| {
        let mut forks = sizes["forks"].as_array().unwrap().iter();
        forks.find(|f| f["volume"] == volume).unwrap()["size"].clone()
    };
    assert_eq!(
        (size("shop"), size("shop/bundle")),
        ((20_u64 << 30).into(), (30_u64 << 30).into())
    );
    cli.write("node_modules/f", "modules");
    cli.write("vendor/bundle/f", "gems");
    let done = cli.end("1", "0");
    assert_eq!(done["shop"], "committed as shop@1");
    assert_eq!(done["shop/bundle"], "committed as shop/bundle@1");

    // A step with more paths in the same volume finds what one with fewer has left, and the other way round.
    assert_eq!(
        cli.got(
            "2",
            &[("BUILDKITE_LABEL", "build")],
            &["--pipeline", "pipeline.yml"]
        ),
        ["shop exact"]
    );
    assert_eq!(
        fs::read_to_string(cli.path("node_modules/f")).unwrap(),
        "modules"
    );
    cli.write(".build/f", "built");
    cli.end("2", "0");
    let handed = [("BUILDKITE_AGENT_CACHE_PATHS", "node_modules,.build")];
    assert_eq!(cli.got("3", &handed, &[]), ["shop exact"]);
    assert_eq!(fs::read_to_string(cli.path(".build/f")).unwrap(), "built");
    cli.end("3", "1");

    let output = cli.attach_on(&[], &[&["--job", "4"], &pipeline("bare")[..]].concat());
    assert_eq!(output.stdout, b"{\"attach\":null}\n", "{output:?}");
    let output = cli.attach_on(&[], &[&["--job", "4"], &pipeline("none")[..]].concat());
    assert_eq!(output.status.code(), Some(2));
    let line = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        line.starts_with("forkvol: pipeline.yml:3:3: there is no step"),
        "{line}"
    );
}

#[test]
fn a_file_in_the_folder_says_what_a_job_has_and_how() {
    let cli = Cli::new();
    cli.write("lock", "1");
    cli.write(
        ".forkvol.yml",
        "cache:
  - {name: 'deps-${BRANCH}', paths: deps, lock-file: lock, parents: [deps-main], labels: {os: x}}
  - {name: tools, paths: tools, commit: if-missing, link: symlink, scope: global}
  - {name: ro, paths: ro, read-only: true}
",
    );
    let main = [("BRANCH", "main")];
    let all = ["shop/deps-main empty", "tools empty", "shop/ro empty"];
    assert_eq!(cli.got("1", &main, &[]), all);
    assert!(
        fs::symlink_metadata(cli.path("tools"))
            .unwrap()
            .is_symlink()
    );
    cli.write("deps/f", "of main");
    cli.write("tools/f", "1");
    let done = cli.end("1", "0");
    assert_eq!(done["shop/deps-main"], "committed as shop/deps-main@1");
    assert_eq!(done["tools"], "committed as tools@1");
    assert_eq!(done["shop/ro"], "not committed");

    let args = ["--config", ".forkvol.yml"];
    let got = cli.got("2", &[("BRANCH", "topic/x")], &args);
    assert!(
        got[0].starts_with("shop/deps-topic-x-") && got[0].ends_with(" fallback"),
        "{got:?}"
    );
    assert_eq!(fs::read_to_string(cli.path("deps/f")).unwrap(), "of main");
    cli.write("deps/f", "of topic");
    cli.write("tools/f", "2");
    assert_eq!(
        cli.end("2", "0")["tools"],
        "not committed",
        "there is a version already"
    );
    assert_eq!(cli.ok(&["cat", "tools:tools/f"]), "1");

    cli.write("lock", "2");
    assert_eq!(cli.got("3", &main, &[])[0], "shop/deps-main stale");
    cli.end("3", "1");
    // What the command line names is all there is.
    assert_eq!(
        cli.got("4", &main, &["-v", "own", "-p", "own"]),
        ["own empty"]
    );
    cli.end("4", "1");
}

#[test]
fn what_a_folder_tells_is_shown_and_attached() {
    let cli = Cli::new();
    cli.write("package-lock.json", "{}");
    let variables = [("npm_config_cache", "./npm-cache")];
    assert_eq!(
        cli.got("1", &variables, &["--preset", "auto"]),
        ["shop/npm empty"]
    );
    cli.write("npm-cache/f", "x");
    assert_eq!(cli.end("1", "0")["shop/npm"], "committed as shop/npm@1");
    let shown = cli.command(&["detect"]).output().unwrap();
    assert!(shown.status.success());
    fs::write(cli.path(".forkvol.yml"), shown.stdout).unwrap();
    assert_eq!(cli.got("2", &variables, &[]), ["shop/npm exact"]);
    cli.end("2", "1");
}

#[test]
fn volumes_with_conditions_of_their_own_are_committed_as_one_or_not_at_all() {
    let cli = Cli::new();
    cli.write(
        ".forkvol.yml",
        "cache:
  - {name: a, paths: a}
  - {name: b, paths: b, commit: on-change}
  - {name: c, paths: c, commit: if-missing}
  - {name: d, paths: d, commit: never}
",
    );
    let head = |name: &str| cli.json(&["volume", "show", name])["volume"]["head"].clone();
    let heads = || ["shop/a", "shop/b", "shop/c", "shop/d"].map(head);
    cli.got("1", &[], &[]);
    for file in ["a/f", "b/f", "c/f", "d/f"] {
        cli.write(file, "1");
    }
    cli.end("1", "0");
    let none = serde_json::Value::Null;
    assert_eq!(heads(), [1.into(), 1.into(), 1.into(), none.clone()]);
    cli.got("2", &[], &[]);
    for file in ["a/f", "b/f", "c/f"] {
        cli.write(file, "2");
    }
    // What the job began from is no part of its history any more: its commit is refused.
    cli.ok(&["volume", "reset", "shop/b"]);
    let finish = cli.call(&["finish", "--job", "2", "--status", "0"]);
    let talk = String::from_utf8_lossy(&finish.stderr).into_owned();
    assert!(
        finish.status.success() && talk.contains("taken back"),
        "{talk}"
    );
    assert_eq!(heads()[0], 1, "nothing of the job is committed");
    assert_eq!(cli.ok(&["cat", "shop/a:a/f"]), "1");
    assert_eq!(cli.json(&["forks"])["forks"], serde_json::json!([]));
    cli.got("3", &[], &[]);
    for file in ["a/f", "b/f", "c/f"] {
        cli.write(file, "3");
    }
    let done = cli.end("3", "0");
    assert_eq!(done["shop/a"], "committed as shop/a@2");
    assert_eq!(
        (&done["shop/c"], &done["shop/d"]),
        (&"not committed".into(), &"abandoned".into())
    );
    assert_eq!(cli.ok(&["cat", "shop/b:b/f"]), "3");
}

#[test]
fn a_job_s_folder_shows_what_was_there_and_the_room_that_its_pipeline_asks_for() {
    let cli = Cli::new();
    cli.write(
        "pipeline.yml",
        "steps:\n  - {key: s, command: x, cache: {paths: c, name: deps, size: 25g}}\n",
    );
    let args = ["--pipeline", "pipeline.yml", "--step", "s"];
    let room = || {
        let found = rustix::fs::statvfs(cli.path("c")).unwrap();
        let bytes = |blocks: u64| blocks * found.f_frsize;
        (bytes(found.f_blocks), bytes(found.f_blocks - found.f_bfree))
    };
    assert_eq!(cli.got("1", &[], &args), ["shop/deps empty"]);
    let (granted, used) = room();
    // A folder for the path takes a little; there is no more room than the disk has.
    let disk = rustix::fs::statvfs(cli.dir.path()).unwrap();
    let least = ((25 << 30) - (64 << 10)).min(disk.f_bavail * disk.f_frsize / 2);
    let all = least..=25_u64 << 30;
    assert!(all.contains(&granted) && used == 0, "{granted} {used}");
    let data = (0..3_u32 << 18)
        .flat_map(u32::to_le_bytes)
        .collect::<Vec<u8>>();
    fs::write(cli.path("c/f"), &data).unwrap();
    let last = room().1;
    assert!(last >= data.len() as u64, "{last}");
    cli.end("1", "0");
    assert_eq!(cli.got("2", &[], &args), ["shop/deps exact"]);
    let (granted, used) = room();
    let asked = granted - used;
    assert!(all.contains(&asked), "{asked} beside what was used last");
    assert!(used >= data.len() as u64, "{used}");
    // What is deleted of the base gives no room.
    let free = |(granted, used): (u64, u64)| granted - used;
    fs::remove_file(cli.path("c/f")).unwrap();
    assert!(free(room()) <= 25 << 30);
    cli.end("2", "1");
}

#[test]
fn a_job_that_asks_for_nothing_gets_nothing_and_no_variables_of_an_earlier_one() {
    let cli = Cli::new();
    cli.write("job.env", "FORKVOL_HIT='exact'\n");
    let attach = ["--job", "1", "--env-file", "job.env"];
    let output = cli.attach_on(&[], &attach);
    assert!(output.status.success(), "{output:?}");
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(said, serde_json::json!({"attach": null}));
    assert_eq!(fs::read_to_string(cli.path("job.env")).unwrap(), "");
    assert!(!cli.path("store").exists(), "no store is made for it");
}

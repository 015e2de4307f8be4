//! What goes by itself, and what a store beyond its limit says.

use super::*;

impl Cli {
    fn configure(&self, text: &str) {
        fs::create_dir_all(self.path("config/forkvol")).unwrap();
        fs::write(self.path("config/forkvol/config.toml"), text).unwrap();
    }

    fn versions(&self, volume: &str, count: usize) {
        for n in 0..count {
            let script = format!("echo {n} > cache/f");
            assert!(
                self.run(volume, &self.path("cache"), &script)
                    .status
                    .success()
            );
        }
    }

    fn numbers(&self, volume: &str) -> Vec<u64> {
        let log = self.json(&["log", volume]);
        let versions = log["versions"].as_array().unwrap().iter();
        versions.map(|v| v["number"].as_u64().unwrap()).collect()
    }
}

#[test]
fn gc_lets_go_what_the_configuration_lets_go_and_says_so_before() {
    let cli = Cli::new();
    cli.configure(
        "min-free = \"0\"
        [[retention]]
        volumes = \"short/*\"
        keep-versions = 1
        keep-for = \"0s\"
        [[retention]]
        volumes = \"idle\"
        unused-for = \"0s\"\n",
    );
    cli.ok(&["config", "check"]);
    for (volume, count) in [("short/a", 3), ("short/a/b", 3), ("long", 3), ("idle", 1)] {
        cli.versions(volume, count);
    }
    cli.ok(&["pin", "short/a@1"]);
    let would = cli.json(&["gc", "--dry-run"]);
    let gone = |report: &serde_json::Value| {
        (
            report["gc"]["volumes"].clone(),
            report["gc"]["versions"].clone(),
        )
    };
    let expected = (
        serde_json::json!(["idle"]),
        serde_json::json!(["short/a@2"]),
    );
    assert_eq!(gone(&would), expected);
    assert_eq!(
        cli.numbers("short/a"),
        [3, 2, 1],
        "a dry run removes nothing"
    );
    assert_eq!(gone(&cli.json(&["gc"])), expected);
    assert_eq!(cli.numbers("short/a"), [3, 1]);
    assert_eq!(cli.numbers("short/a/b"), [3, 2, 1]);
    assert_eq!(cli.numbers("long"), [3, 2, 1]);
    assert_eq!(cli.fails(&["log", "idle"]).0, 10);
    let counters = cli.json(&["stats"])["counters"].clone();
    assert_eq!(
        (&counters["removed_versions"], &counters["removed_volumes"]),
        (&1.into(), &1.into())
    );
    cli.check();
}

#[test]
fn a_store_beyond_its_limit_refuses_forks_and_a_job_has_a_miss() {
    let cli = Cli::new();
    cli.configure("limit = \"1\"\nmin-free = \"0\"\n");
    cli.versions("v", 1);
    cli.ok(&["gc"]);
    assert_eq!(cli.numbers("v"), [1], "what was used within the hour stays");
    let (status, line) = cli.fails(&["fork", "v", "m"]);
    assert_eq!(status, 16, "{line}");
    assert!(line.contains("beyond the limit"), "{line}");
    let attach = [
        "attach",
        "--job",
        "1",
        "--mount-root",
        "mounts",
        "-v",
        "v",
        "-p",
        "c",
    ];
    let attached = cli.json(&attach)["attach"].clone();
    assert_eq!(
        (&attached["degraded"], &attached["hit"]),
        (&true.into(), &"empty".into())
    );
    assert!(cli.path("c").is_dir(), "an empty folder is there instead");
    cli.ok(&["finish", "--job", "1", "--status", "0"]);
    assert_eq!(cli.fails(&[&attach[..], &["--strict"]].concat()).0, 16);
    assert_eq!(
        cli.run("v", &cli.path("c"), "true").status.code(),
        Some(125)
    );

    cli.ok(&["daemon", "stop"]);
    cli.configure("limit = \"100g\"\nmin-free = \"0\"\n");
    assert_eq!(cli.json(&attach)["attach"]["hit"], "exact");
    cli.ok(&["finish", "--job", "1", "--status", "0"]);
}

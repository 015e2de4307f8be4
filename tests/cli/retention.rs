//! What goes by itself, and what a store beyond its limit says.

use forkvol::store::{Store, StoreOptions};

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

    pub fn numbers(&self, volume: &str) -> Vec<u64> {
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

/// Has all volumes of a store that no daemon serves be used that much earlier.
fn used_earlier(store: &Path, hours: i64) {
    let store = Store::open(store, StoreOptions::default()).unwrap();
    for volume in store.volumes().unwrap() {
        let then = volume.used - hours * 3_600_000_000_000;
        store.touch_volume(volume.id, then).unwrap();
    }
}

#[test]
fn where_a_small_disk_runs_short_the_daemon_lets_go_what_was_used_least_and_the_main_line_last() {
    let disk = full::SmallDisk::new();
    let cli = &disk.cli;
    cli.configure("reserve = \"0\"\nmin-free = \"100m\"\n");
    for (volume, megabytes) in [
        ("old", 30),
        ("mid", 15),
        ("mid", 15),
        ("new", 30),
        ("new/branch/x", 30),
    ] {
        let script = format!("head -c {megabytes}M /dev/urandom > cache/f");
        let done = cli.run(volume, &cli.path("cache"), &script);
        assert!(done.status.success(), "{done:?}");
    }
    // What the jobs wrote is removed behind their backs.
    let begun = Instant::now();
    while fs::read_dir(cli.path("store/forks")).unwrap().count() > 0 {
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "a fork's room stays"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    cli.ok(&["daemon", "stop"]);
    used_earlier(&cli.path("store"), 2);
    // Older versions and the branch are not enough; with what was used least it is.
    disk.leave(50 << 20);
    let counters = || {
        let stats = cli.call(&["stats", "--json"]);
        serde_json::from_slice::<serde_json::Value>(&stats.stdout).unwrap_or_default()["counters"]
            .clone()
    };
    let begun = Instant::now();
    while counters()["gcs"] != 1 {
        assert!(begun.elapsed() < Duration::from_secs(150), "{}", counters());
        std::thread::sleep(Duration::from_millis(500));
    }
    let left = cli.json(&["volumes"]);
    let left = left["volumes"].as_array().unwrap().iter();
    let left: Vec<&str> = left.map(|v| v["name"].as_str().unwrap()).collect();
    assert_eq!(left, ["mid", "new"]);
    assert_eq!(cli.numbers("mid"), [2]);
    assert_eq!(
        (
            &counters()["removed_volumes"],
            &counters()["removed_versions"]
        ),
        (&2.into(), &1.into())
    );
    let fork = cli.ok(&["fork", "new", "m"]);
    cli.ok(&["abandon", &fork]);

    // What may not go does not, and then there are no forks.
    cli.ok(&["pin", "new"]);
    cli.ok(&["pin", "mid"]);
    disk.leave(50 << 20);
    cli.ok(&["gc"]);
    assert_eq!((cli.numbers("mid"), cli.numbers("new")), (vec![2], vec![1]));
    let (status, line) = cli.fails(&["fork", "new", "m"]);
    assert!(status == 16 && line.contains("min-free"), "{status} {line}");
    let attached = cli.json(&["attach", "--job", "1", "-v", "new", "-p", "c"])["attach"].clone();
    assert_eq!(
        (&attached["degraded"], &attached["hit"]),
        (&true.into(), &"empty".into())
    );
    cli.ok(&["finish", "--job", "1", "--status", "0"]);
    disk.leave(150 << 20);
    let fork = cli.ok(&["fork", "new", "m"]);
    cli.ok(&["abandon", &fork]);
    cli.check();
    cli.ok(&["daemon", "stop"]);
}

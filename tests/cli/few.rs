//! A daemon that may open few files refuses what it cannot do, keeps nothing of it, and goes on with the rest.

use super::*;

#[test]
fn a_fork_that_is_refused_for_want_of_descriptors_leaves_nothing_and_the_others_go_on() {
    // Each limit lets something else be the first that cannot be opened: a log, a spool, a device, a client.
    for limit in 118..=122 {
        refused_at(limit);
    }
}

fn refused_at(limit: u32) {
    println!("{limit} descriptors");
    let cli = Cli::new();
    // The daemon has the limits of the command that starts it.
    let started = Command::new("bash")
        .args(["-c", &format!("ulimit -n {limit}; exec \"$0\" volumes")])
        .arg(env!("CARGO_BIN_EXE_forkvol"))
        .env("FORKVOL_STORE", cli.path("store"))
        .env("XDG_CONFIG_HOME", cli.path("config"))
        .status();
    assert!(started.unwrap().success());
    let mount = |n: usize| cli.path(&format!("m{n}"));
    let mut forks = Vec::new();
    let refused = loop {
        assert!(forks.len() < 120, "there is no limit");
        let output = cli.call(&["fork", "v", mount(forks.len()).to_str().unwrap()]);
        if !output.status.success() {
            break String::from_utf8(output.stderr).unwrap();
        }
        let id = String::from_utf8(output.stdout).unwrap();
        forks.push(id.trim().to_owned());
    };
    assert!(refused.contains("too many open files"), "{refused}");
    assert_eq!(refused.lines().count(), 1, "{refused}");
    assert!(forks.len() > 5, "{} forks", forks.len());
    assert!(!mount(forks.len()).exists());
    // Again and again, which takes nothing either; what the daemon has closed meanwhile may do for one more.
    let mut refusals = 0;
    while refusals < 5 {
        let output = cli.call(&["fork", "v", mount(forks.len()).to_str().unwrap()]);
        match output.status.success() {
            true => forks.push(String::from_utf8(output.stdout).unwrap().trim().to_owned()),
            false => refusals += 1,
        }
    }
    let folders = || {
        let entries = fs::read_dir(cli.path("store/forks")).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.collect();
        names.sort();
        names
    };
    let mut expected = forks.clone();
    expected.sort();
    // A folder that could not be removed at once goes a little later.
    let begun = Instant::now();
    while folders() != expected && begun.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(folders(), expected);
    for (n, fork) in forks.iter().enumerate() {
        fs::write(mount(n).join("f"), fork).unwrap();
        assert_eq!(fs::read_to_string(mount(n).join("f")).unwrap(), *fork);
    }
    cli.ok(&["abandon", &forks[0]]);
    cli.ok(&["commit", &forks[1]]);
    assert_eq!(cli.ok(&["cat", "v:f"]), forks[1]);
    cli.ok(&["fork", "v", mount(0).to_str().unwrap()]);
    assert_eq!(fs::read_to_string(mount(0).join("f")).unwrap(), forks[1]);
    let begun = Instant::now();
    while folders().iter().any(|name| name.ends_with(".gone")) {
        assert!(begun.elapsed() < Duration::from_secs(30), "a folder stays");
        std::thread::sleep(Duration::from_millis(50));
    }
    cli.check();
}

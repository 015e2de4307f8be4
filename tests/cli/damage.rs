//! A store that is damaged, and one on a full disk.

use super::environment::{expect, surrounded};
use super::*;

#[test]
fn a_damaged_store_says_so_and_is_never_replaced_by_an_empty_one() {
    let cli = Cli::new();
    let script = "echo 1 > cache/f; head -c 3000000 /dev/urandom > cache/g";
    cli.run("v", &cli.path("cache"), script);
    cli.run("v", &cli.path("cache"), "echo 2 > cache/f");
    cli.ok(&["daemon", "stop"]);
    let good = cli.path("good");
    let copy = |from: &Path, to: &Path| {
        let done = Command::new("cp")
            .arg("-a")
            .args([from, to])
            .status()
            .unwrap();
        assert!(done.success());
    };
    copy(&cli.path("store"), &good);
    let files = |ending: &str| -> Vec<String> {
        let names = fs::read_dir(good.join("db")).unwrap();
        let names = names.map(|e| e.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.ends_with(ending)).collect()
    };
    let blob = files(".blob").pop().unwrap();
    let (mut named, mut unreadable) = (0, 0);
    let flip = "printf XXXX | dd bs=1 conv=notrunc status=none of=db";
    let mut harms = vec![
        format!("{flip}/{blob} seek=100000"),
        format!("truncate -s 1000000 db/{blob}"),
        format!("rm db/{blob}"),
        "rm db/CURRENT".into(),
        "echo junk > db/CURRENT".into(),
        "rm db/MANIFEST*".into(),
        "truncate -s 0 db/MANIFEST*".into(),
        "rm -r db".into(),
    ];
    for table in files(".sst") {
        harms.push(format!("{flip}/{table} seek=100"));
        harms.push(format!("truncate -s 500 db/{table}"));
        harms.push(format!("rm db/{table}"));
    }
    for harm in harms {
        fs::remove_dir_all(cli.path("store")).unwrap();
        copy(&good, &cli.path("store"));
        let done = Command::new("bash")
            .args(["-c", &harm])
            .current_dir(cli.path("store"))
            .status()
            .unwrap();
        assert!(done.success(), "{harm}");
        let before = fs::read_dir(cli.path("store/db")).map_or(0, Iterator::count);
        let output = cli.call(&["check", "--json"]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(13), "{harm}: {said}");
        assert!(said.starts_with("forkvol: "), "{harm}: {said}");
        if said.contains("cannot be opened") {
            unreadable += 1;
            assert!(said.contains("put back what is missing"), "{harm}: {said}");
            assert!(!said.contains("check --repair"), "{harm}: {said}");
            let after = fs::read_dir(cli.path("store/db")).map_or(0, Iterator::count);
            assert!(after <= before + 3, "{harm}: a database was made");
            assert_eq!(cli.fails(&["volumes"]).0, 13, "{harm}");
            continue;
        }
        if let Ok(report) = serde_json::from_slice::<serde_json::Value>(&output.stdout) {
            let problems = report["check"]["problems"].as_array().unwrap();
            assert!((1..=4).contains(&problems.len()), "{harm}: {report}");
            for problem in problems {
                let of_store = problem["volume"] == "";
                assert!(problem["volume"] == "v" || of_store, "{harm}: {report}");
                assert_eq!(said.contains("move the store away"), of_store, "{said}");
                named += u32::from(problem["paths"] == serde_json::json!(["/g"]));
            }
        } else {
            assert!(said.contains("the database"), "{harm}: {said}");
        }
        cli.ok(&["daemon", "stop"]);
    }
    assert!(named >= 4 && unreadable >= 8, "{named} {unreadable}");
}

#[test]
fn no_commit_of_a_killed_daemon_is_passed_over_because_of_a_byte_before_it() {
    let cli = Cli::new();
    for n in 1..=3 {
        cli.run("v", &cli.path("cache"), &format!("echo {n} > cache/f"));
    }
    cli.kill_daemon();
    let newest_log = || {
        let files = fs::read_dir(cli.path("store/db")).unwrap();
        let files = files.map(|entry| entry.unwrap().path());
        let logs = files.filter(|path| path.extension().is_some_and(|e| e == "log"));
        logs.max().unwrap()
    };
    let log = newest_log();
    let good = fs::read(&log).unwrap();
    let mut damaged = good.clone();
    damaged[good.len() / 3] ^= 4;
    fs::write(&log, &damaged).unwrap();
    for command in ["check", "volumes"] {
        let (code, line) = cli.fails(&[command]);
        assert!(code == 13 && line.contains("is wrong at byte"), "{line}");
        assert!(line.contains(log.to_str().unwrap()), "{line}");
        assert!(fs::read(&log).unwrap() == damaged);
    }
    fs::write(&log, &good).unwrap();
    assert_eq!(cli.ok(&["cat", "v@3:f"]), "3");
    cli.kill_daemon();
    // What the line says of going on without that file.
    fs::remove_file(newest_log()).unwrap();
    cli.ok(&["volumes"]);
    cli.ok(&["daemon", "stop"]);
}

#[test]
fn on_a_full_disk_nothing_is_lost_and_work_goes_on_when_there_is_room() {
    let lines = surrounded(
        r#"printf 'reserve = "0"\n' > config/forkvol/config.toml
        mkdir store
        mount -t tmpfs -o size=260m,mode=700 none store
        forkvol run -v v -p c -- bash -c 'head -c 3000000 /dev/urandom > c/old' 2> err
        sum() { md5sum < "$1"; }
        old=$(forkvol cat v:old | md5sum)
        forkvol fork v m > id
        forkvol fork v m2 > id2
        pid=$(forkvol daemon status --json | grep -o '"pid":[0-9]*')
        echo mine > m2/x
        mkdir m2/many
        (cd m2/many && touch $(seq 500))
        fallocate -l $(($(df --output=avail -B1 store | tail -1) - 75000000)) store/filler
        # Bytes that are copied, for an eighth of them goes.
        head -c 60000000 /dev/urandom | LC_ALL=C tr '\200-\377' '\000-\177' > m/big
        big=$(sum m/big)
        echo "a commit that does not fit"
        says forkvol commit ./m
        says forkvol commit ./m
        echo "writers"
        { head -c 30000000 /dev/urandom > m2/z; } 2> err || grep -o 'No space left on device' err
        says forkvol fork w m3
        says forkvol run -v v -p c -- true
        says forkvol gc
        echo "reads and deletes"
        [ "$(sum m/big)" = "$big" ] && [ "$(forkvol cat v:old | md5sum)" = "$old" ] && [ "$(sum m/old)" = "$old" ]
        cat m2/x
        cat /dev/zero 2> err > store/rest || tail -c 24 err
        rm -r m2/x m2/many
        ls m2
        rm store/rest
        forkvol log v --json | grep -o '"number":[0-9]*'
        forkvol check | grep -o ' 0 problems'
        forkvol abandon "$(cat id2)" | wc -l
        forkvol forks --json | grep -o '"id":' | wc -l
        echo "room"
        rm store/filler
        forkvol commit ./m
        [ "$(forkvol cat v:big | md5sum)" = "$big" ]
        forkvol gc > out
        forkvol check | grep -o ' 0 problems'
        [ "$pid" = "$(forkvol daemon status --json | grep -o '"pid":[0-9]*')" ]
        forkvol daemon stop
        forkvol forks --json 2> err
        for n in $(seq 200); do [ -z "$(ls store/forks)" ] && break; sleep 0.05; done
        ls store/forks | wc -l"#,
    );
    let full: (&str, &[&str]) = ("16", &["full", "room"]);
    expect(
        &lines,
        &[
            ("a", &["does not fit"]),
            full,
            full,
            ("writers", &[]),
            ("No", &["space left"]),
            ("16", &["room"]),
            ("125", &["room"]),
            full,
            ("reads", &[]),
            ("mine", &[]),
            ("No", &["space left"]),
            ("old", &[]),
            ("z", &[]),
            ("\"number\":1", &[]),
            ("", &["0 problems"]),
            ("1", &[]),
            ("1", &[]),
            ("room", &[]),
            ("v@2", &[]),
            ("", &["0 problems"]),
            ("{\"forks\":[]}", &[]),
            ("0", &[]),
        ],
    );
}

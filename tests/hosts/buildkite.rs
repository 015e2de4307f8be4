//! The hooks for Buildkite, under a program that plays its agent (`tests/hosts/buildkite-agent`).

use serde_json::json;

use super::host::{Host, Job, npm};
use super::*;

const ORDERS: [&str; 2] = ["v3", "v4"];

#[test]
fn a_job_that_does_well_is_committed_and_the_next_one_is_warm() {
    for order in ORDERS {
        let host = Host::new();
        let mut job = Job::new("1", "echo warm >cache/f; [[ $FORKVOL_HIT_NPM == empty ]]");
        job.order = order;
        host.passes(&job);
        assert!(
            !host.checkout("agent-1").join("cache").exists(),
            "what was made for it is gone"
        );
        job.id = "2";
        job.command =
            "[[ $(cat cache/f) == warm && $FORKVOL_HIT == exact && $FORKVOL_COMMIT_NPM == yes ]]";
        host.passes(&job);
        assert_eq!(host.versions("npm"), 1, "reading makes no version");
        host.nothing_is_left();
    }
}

#[test]
fn only_a_job_that_does_well_to_its_end_is_committed() {
    let cases = [
        ("the command fails", "exit 7", "", "", 7),
        (
            "a hook behind it fails",
            "true",
            "post-command",
            "exit 3",
            3,
        ),
        ("a hook before it fails", "true", "pre-command", "exit 4", 4),
    ];
    for order in ORDERS {
        let host = Host::new();
        host.passes(&Job::new("0", "echo kept >cache/f"));
        for (what, command, hook, script, wanted) in cases {
            let command = format!("echo lost >cache/f; {command}");
            let mut job = Job::new("1", &command);
            job.order = order;
            // The repository's hooks come before the plugin's, so what a second use attaches meets the failure too.
            if !hook.is_empty() {
                host.hook("agent-1", hook, script);
            }
            let (status, log) = host.run(&job);
            assert_eq!(status, wanted, "{what}, {order}: {log}");
            assert_eq!(host.forkvol(&["cat", "npm:f"]), "kept", "{what}, {order}");
            host.nothing_is_left();
            if !hook.is_empty() {
                fs::remove_file(host.checkout("agent-1").join(".buildkite/hooks").join(hook))
                    .unwrap();
            }
        }
        let mut job = Job::new("2", "true").with("HOST_CHECKOUT", "exit 9");
        job.order = order;
        let (status, log) = host.run(&job);
        assert_eq!(status, 9, "{log}");
        assert_eq!(host.versions("npm"), 1);
        host.nothing_is_left();
    }
}

#[test]
fn a_status_that_was_named_is_no_failure_for_the_cache() {
    let host = Host::new();
    host.passes(&Job::new("0", "echo 0 >cache/f"));
    let checkout = Job::new("3", "true").with("HOST_CHECKOUT", "exit 9");
    for (job, status, committed) in [
        (Job::new("1", "echo 7 >cache/f; exit 7"), 7, true),
        (Job::new("2", "echo 8 >cache/f; exit 8"), 8, false),
        (checkout, 9, false),
    ] {
        let mut job = job;
        job.plugins = vec![npm(&json!({"success": [3, 7, 9]}))];
        let before = host.versions("npm");
        let (ended, log) = host.run(&job);
        assert_eq!(ended, status, "{log}");
        assert_eq!(host.versions("npm") > before, committed, "{status}: {log}");
        host.nothing_is_left();
    }
}

#[test]
fn a_job_whose_command_never_ran_is_not_committed() {
    let host = Host::new();
    // The plugin twice: its second use refuses to start, and the command never runs.
    let mut job = Job::new("1", "echo never >cache/f");
    job.plugins
        .push(json!({"strict": true, "volumes": [{"name": "bad//name", "paths": "x"}]}));
    let (status, log) = host.run(&job);
    assert_ne!(status, 0, "{log}");
    assert!(!log.contains("~~~ command"), "{log}");
    assert_eq!(host.forkvol(&["log", "npm"]), "");
    host.nothing_is_left();
}

#[test]
fn what_fails_after_the_plugin_s_last_hook_is_too_late_for_it() {
    for (order, committed) in [("v3", false), ("v4", true)] {
        let host = Host::new();
        host.hook("agent-1", "pre-exit", "exit 6");
        let mut job = Job::new("1", "echo 1 >cache/f");
        job.order = order;
        let (status, log) = host.run(&job);
        assert_eq!(status, 6, "{log}");
        assert_eq!(host.forkvol(&["cat", "npm:f"]) == "1", committed, "{order}");
        // Version 3 never came to the plugin's hook; the next job does its work.
        let file = host.checkout("agent-1").join(".buildkite/hooks/pre-exit");
        fs::remove_file(file).unwrap();
        host.passes(&Job::new("2", "true").with("HOST_CHECKOUT", "[[ ! -e cache ]]"));
        host.nothing_is_left();
    }
}

#[test]
fn a_job_that_is_cancelled_or_times_out_is_never_committed() {
    for order in ORDERS {
        for (at, how) in ["cancelled", "timed out"].into_iter().enumerate() {
            let host = Host::new();
            let begun = host.path("begun");
            // It takes the signal for its end and exits 0, as some do.
            let command = format!(
                "trap 'exit 0' TERM; echo half >cache/f; touch {}; sleep 600 & wait",
                begun.display()
            );
            let mut job = Job::new("1", &command);
            job.order = order;
            job.plugins = vec![npm(&json!({"commit": "always"}))];
            if at == 1 {
                job = job.with("HOST_TIMES_OUT", "1");
            }
            let mut agent = host.start(&job);
            host.wait_for(&begun);
            forkvol::sys::process::kill(agent.id(), 15).unwrap();
            let status = agent.wait().unwrap();
            assert!(host.forkvol(&["log", "npm"]).is_empty(), "{how}: {status}");
            host.nothing_is_left();
        }
    }
}

#[test]
fn a_killed_agent_s_job_is_run_again_green_and_warm() {
    let host = Host::new();
    host.passes(&Job::new("0", "echo warm >cache/f"));
    let begun = host.path("begun");
    let command = format!("echo half >cache/f; touch {}; sleep 600", begun.display());
    // First the agent with all its processes, then the job's process alone: an agent that runs several at once lives on.
    for round in ["agent", "job"] {
        let mut agent = host.start(&Job::new("1", &command));
        host.wait_for(&begun);
        fs::remove_file(&begun).unwrap();
        let below = |pid: u32| -> Vec<u32> {
            let all = Command::new("ps")
                .args(["-e", "-o", "pid=,ppid="])
                .output()
                .unwrap();
            text(&all.stdout)
                .lines()
                .filter_map(|line| {
                    let (child, parent) = line.trim().split_once(' ')?;
                    (parent.trim().parse() == Ok(pid)).then(|| child.parse().ok())?
                })
                .collect()
        };
        let bootstraps = below(agent.id());
        let mut victims = bootstraps.clone();
        for pid in &bootstraps {
            victims.extend(
                below(*pid)
                    .iter()
                    .flat_map(|pid| [vec![*pid], below(*pid)].concat()),
            );
        }
        if round == "agent" {
            victims.push(agent.id());
        }
        for pid in victims {
            forkvol::sys::process::kill(pid, 9).unwrap();
        }
        agent.wait().unwrap();
        assert!(
            host.checkout("agent-1").join("cache/f").exists(),
            "its mount is still there"
        );
        // What the next checkout does would stumble over it.
        let again = Job::new("1", "[[ $(cat cache/f) == warm && $FORKVOL_HIT == exact ]]")
            .with("HOST_CHECKOUT", "[[ ! -e cache ]]");
        host.passes(&again);
        host.nothing_is_left();
    }
}

#[test]
fn two_agents_at_once_have_each_their_own_fork_of_one_volume() {
    let host = Host::new();
    host.passes(&Job::new("0", "echo 0 >cache/f"));
    std::thread::scope(|scope| {
        for n in 1..=2 {
            let host = &host;
            scope.spawn(move || {
                let (id, agent) = (n.to_string(), format!("agent-{n}"));
                let other = host.path(&format!("ready-{}", 3 - n));
                let command = format!(
                    "echo {n} >cache/f; touch {}; until [[ -e {} ]]; do sleep 0.01; done; [[ $(cat cache/f) == {n} ]]",
                    host.path(&format!("ready-{n}")).display(),
                    other.display()
                );
                let mut job = Job::new(&id, &command);
                job.agent = &agent;
                host.passes(&job);
            });
        }
    });
    assert_eq!(host.versions("npm"), 3);
    host.nothing_is_left();
}

#[test]
fn without_a_cache_a_job_goes_on_unless_it_is_strict() {
    let host = Host::new();
    fs::create_dir(host.path("store")).unwrap();
    fs::write(host.path("store/precious"), "no store of ours").unwrap();
    let mut job = Job::new("1", "[[ -d cache && $FORKVOL_HIT == empty ]]");
    let log = host.passes(&job);
    assert!(log.contains("not a store"), "{log}");
    // Without the program, or with options that it does not take, too.
    job.command = "[[ -d cache ]]";
    host.passes(&job.clone().with("PATH", "/usr/bin:/bin"));
    job.plugins = vec![json!({"volumes": [{"name": "bad//name", "paths": "cache"}]})];
    host.passes(&job);
    for options in [
        npm(&json!({"strict": true})),
        json!({"strict": true, "volumes": [{"name": "npm", "size": "lots", "paths": "cache"}]}),
        json!({"strict": true, "volumes": [{"paths": "cache"}]}),
    ] {
        job.plugins = vec![options];
        let (status, log) = host.run(&job);
        assert_ne!(status, 0, "{log}");
        assert!(!log.contains("~~~ command"), "{log}");
    }
}

#[test]
fn a_commit_that_fails_fails_a_strict_job_alone_and_never_hides_why_a_job_failed() {
    // The daemon goes away under the job and cannot come back.
    let command = |end: &str| {
        format!(
            "forkvol daemon stop --force; mv $FORKVOL_STORE $FORKVOL_STORE.aside; touch $FORKVOL_STORE; {end}"
        )
    };
    for (strict, end, wanted) in [(false, "true", 0), (true, "true", 1), (true, "exit 7", 7)] {
        let host = Host::new();
        let command = command(end);
        let mut job = Job::new("1", &command);
        job.plugins = vec![npm(&json!({"strict": strict}))];
        let (status, log) = host.run(&job);
        assert_eq!(status, wanted, "{strict} {end}: {log}");
        fs::remove_file(host.path("store")).unwrap();
        fs::rename(host.path("store.aside"), host.path("store")).unwrap();
        // The next job clears it away.
        host.passes(&Job::new("2", "true").with("HOST_CHECKOUT", "[[ ! -e cache ]]"));
        host.nothing_is_left();
    }
}

#[test]
fn every_option_of_the_plugin_reaches_its_volumes() {
    let host = Host::new();
    let options = json!({
        "commit": "on-change", "link": "bind", "existing": "hide", "deadline": "20s", "mount-root": host.path("mounts"),
        "volumes": [
            {"name": "base", "paths": ["a b", "c"], "labels": ["lock=1", "os=x y"], "exclude": "*.tmp", "size": "1g"},
            {"name": "shop/branch/x", "paths": "d", "parents": ["none", "base"], "read-only": true},
            {"name": "same", "paths": "e", "labels": ["lock=1", "os=x y"], "exclude": ["*.tmp"], "size": "1g"},
            {"name": "labelled", "paths": "g", "label-files": ["a label"], "manifest": ["the lock", "other"]},
            {"name": "thrown", "paths": "f", "from": "base", "ephemeral": true, "acl": true, "no-default-exclude": true, "owner": "caller"},
        ],
    });
    let mut job = Job::new(
        "1",
        "echo 1 >'a b/f'; echo 2 >c/f; echo 3 >e/f; touch e/x.tmp; echo 4 >f/f; echo 5 >g/f; rm other",
    )
    .with("HOST_CHECKOUT", "echo k=v >'a label'; echo $LOCK >'the lock'; touch other");
    job.plugins = vec![options];
    let log = host.passes(&job);
    let one = log
        .lines()
        .find(|line| line.contains("committed as base@1"));
    for other in ["same", "labelled"] {
        let other = format!("committed as {other}@1");
        assert!(one.is_some_and(|line| line.contains(&other)), "{log}");
    }
    assert_eq!(host.forkvol(&["ls", "same"]).lines().count(), 1);
    assert_eq!(host.forkvol(&["cat", "base:c/f"]), "2");
    assert!(host.forkvol(&["log", "base"]).contains("lock=1 os=x y"));
    job.command =
        "[[ $FORKVOL_HIT_SHOP_BRANCH_X == fallback && -e d/c/f && -e f/c/f ]] && ! touch d/x";
    let log = host.passes(&job);
    let unchanged = ["base (exact hit", "same (exact hit", "labelled (exact hit"];
    let one = |line: &str| unchanged.iter().all(|part| line.contains(part));
    assert!(
        log.lines()
            .any(|line| one(line) && line.matches(" unchanged").count() == 3),
        "{log}"
    );
    assert_eq!(host.forkvol(&["log", "thrown"]), "");
    assert!(host.forkvol(&["log", "labelled"]).contains("k=v manifest="));
    for (lock, hit) in [("", "exact"), ("another", "stale")] {
        let command = format!("[[ $FORKVOL_HIT_LABELLED == {hit} ]]");
        let mut job = job.clone().with("LOCK", lock);
        job.command = &command;
        host.passes(&job);
    }
    let read = fs::read_to_string(scripts().join("buildkite/lib.sh")).unwrap();
    let known = fs::read_to_string(scripts().join("buildkite/plugin.yml")).unwrap();
    let (_, properties) = known.split_once("properties:").unwrap();
    let names = properties
        .lines()
        .filter_map(|line| line.trim().strip_suffix(':'));
    for name in names.filter(|n| !["properties", "items", "oneOf", "enum", "required"].contains(n))
    {
        let variable = name.to_uppercase().replace('-', "_");
        assert!(read.contains(&variable), "nothing reads the option {name}");
    }
    host.nothing_is_left();
}

#[test]
fn volumes_with_options_of_their_own_are_committed_as_one_or_not_at_all() {
    for order in ORDERS {
        let host = Host::new();
        let mut job = Job::new(
            "1",
            "echo 1 >a/f; echo 1 >b/f; [[ $FORKVOL_HIT == empty && $FORKVOL_JSON == *one*two* ]]",
        );
        job.order = order;
        job.plugins = vec![json!({"volumes": [
            {"name": "one", "paths": "a", "labels": "k=1"},
            {"name": "two", "paths": "b", "size": "30g"},
        ]})];
        host.passes(&job);
        job.id = "2";
        job.command = "[[ $FORKVOL_HIT == exact ]]; echo 2 >a/f; rm b/f";
        let log = host.passes(&job);
        assert!(log.contains("nothing is committed"), "{log}");
        assert_eq!(host.forkvol(&["cat", "one:f"]), "1");
        assert_eq!(host.forkvol(&["cat", "two:f"]), "1");
        host.nothing_is_left();
    }
}

#[test]
fn the_agent_s_hooks_attach_what_the_owner_or_the_repository_says() {
    for order in ORDERS {
        let host = Host::with_agent_hooks();
        let list = "# pattern\nacme/shop/deploy  none\nother/*  -v wrong -p wrong\nacme/shop  -v npm -p cache --label k=v\n";
        fs::write(host.path("hooks/pipelines"), list).unwrap();
        let mut job = Job::new("1", "echo warm >cache/f; [[ $FORKVOL_AGENT_HOOKS == 1 ]]");
        job.order = order;
        job.plugins = Vec::new();
        host.passes(&job);
        assert!(host.forkvol(&["log", "npm"]).contains("k=v"));
        job.id = "2";
        job.command = "[[ $(cat cache/f) == warm ]]; echo lost >cache/f; exit 5";
        assert_eq!(host.run(&job).0, 5);
        assert_eq!(host.forkvol(&["cat", "npm:f"]), "warm");
        job.command = "[[ ! -e cache ]]";
        host.passes(&job.clone().with("BUILDKITE_STEP_KEY", "deploy"));
        // In version 3 the agent's pre-exit runs before the plugin's, and leaves it what is the plugin's.
        job.plugins = vec![json!({"volumes": [{"name": "own", "paths": "own"}]})];
        job.command = "echo own >own/f";
        host.passes(&job);
        assert_eq!(host.forkvol(&["cat", "own:f"]), "own");
        let list = "acme/*  -v npm -p cache --size lots --strict\n";
        fs::write(host.path("hooks/pipelines"), list).unwrap();
        assert_ne!(host.run(&job).0, 0);
        host.nothing_is_left();
    }
}

#[test]
fn a_repository_s_own_list_is_taken_where_the_owner_has_none() {
    let host = Host::with_agent_hooks();
    // Only what the hook asks for is looked at.
    let folder = host.path("bin");
    fs::create_dir(&folder).unwrap();
    let program = folder.join("forkvol");
    fs::write(&program, "#!/bin/sh\necho \"$*\" >>$HOST_CALLS\n").unwrap();
    Command::new("chmod")
        .arg("+x")
        .arg(&program)
        .status()
        .unwrap();
    let mut job = Job::new("1", "true")
        .with("PATH", format!("{}:{}", folder.display(), path_variable()))
        .with("HOST_CALLS", host.path("calls").to_str().unwrap())
        .with("HOST_CHECKOUT", "touch .forkvol.yml");
    job.plugins = Vec::new();
    host.passes(&job);
    let calls = fs::read_to_string(host.path("calls")).unwrap();
    let attach = calls
        .lines()
        .find(|call| call.starts_with("attach"))
        .unwrap();
    assert!(attach.ends_with("--config .forkvol.yml"), "{attach}");
    assert!(
        calls.contains(&format!(
            "finish --job {} --outcome success",
            host.job_id("1")
        )),
        "{calls}"
    );
}

#[test]
fn the_agent_s_startup_hook_tells_what_stands_in_the_way_and_never_fails() {
    let host = Host::with_agent_hooks();
    for path in [path_variable(), "/usr/bin:/bin".into()] {
        let output = Command::new("bash")
            .arg(host.path("hooks/agent-startup"))
            .env("PATH", path)
            .env("FORKVOL_STORE", host.path("store"))
            .output()
            .unwrap();
        let said = well(&output);
        assert!(
            said.contains("kernel:") || said.contains("not on this agent's PATH"),
            "{said}"
        );
    }
}

#[test]
fn a_key_of_the_cache_plugin_is_a_volume() {
    let host = Host::with_agent_hooks();
    let backend = scripts().join("buildkite/cache_forkvol");
    let call = |hooks: &str, args: &[&str]| {
        let output = Command::new(&backend)
            .args(args)
            .env("PATH", path_variable())
            .env("FORKVOL_STORE", host.path("store"))
            .env("FORKVOL_AGENT_HOOKS", hooks)
            .env("BUILDKITE_JOB_ID", host.job_id("1"))
            .current_dir(host.dir.path())
            .output()
            .unwrap();
        (output.status.code().unwrap(), text(&output.stderr))
    };
    let ok = |hooks: &str, args: &[&str]| {
        let (status, said) = call(hooks, args);
        assert_eq!(status, 0, "{args:?}: {said}");
    };
    fs::create_dir_all(host.path("modules/sub")).unwrap();
    fs::write(host.path("modules/sub/f"), "1").unwrap();
    let key = "v1 cache/ünder-key";
    assert_ne!(call("", &["exists", key]).0, 0);
    assert_ne!(call("", &["get", key, "out"]).0, 0);
    ok("", &["save", key, "modules"]);
    ok("", &["exists", key]);
    assert_ne!(
        call("", &["exists", "v1-cache--nder-key"]).0,
        0,
        "keys stay apart"
    );
    // Copied where nobody would take a mount away.
    ok("", &["get", key, "copied"]);
    assert_eq!(fs::read_to_string(host.path("copied/sub/f")).unwrap(), "1");
    assert_eq!(host.forkvol(&["forks"]), "");
    // A fork where the agent's hooks do; saved where it is, under another key taken in.
    ok("1", &["get", key, "mounted"]);
    assert!(host.forkvol(&["jobs"]).contains("attached"));
    fs::write(host.path("mounted/sub/f"), "2").unwrap();
    ok("1", &["save", "other", "mounted"]);
    ok("1", &["save", key, "mounted"]);
    for key in [key, "other"] {
        let to = format!("again-{key}").replace('/', "-");
        ok("", &["get", key, &to]);
        assert_eq!(
            fs::read_to_string(host.path(&to).join("sub/f")).unwrap(),
            "2"
        );
    }
    let mut job = Job::new("1", "true");
    job.plugins = Vec::new();
    host.passes(&job);
    assert!(
        !host.path("mounted").exists(),
        "the agent's pre-exit took it away"
    );
    // A file, as the plugin's compression makes one; what is not whole is no version.
    fs::write(host.path("packed.tgz"), "packed").unwrap();
    ok("", &["save", key, "packed.tgz"]);
    ok("", &["get", key, "got.tgz"]);
    assert_eq!(fs::read_to_string(host.path("got.tgz")).unwrap(), "packed");
    assert_ne!(call("", &["save", "third", "nothing"]).0, 0);
    assert_ne!(call("", &["exists", "third"]).0, 0);
    assert_eq!(call("", &["unknown", key]).0, 255);
    host.nothing_is_left();
}

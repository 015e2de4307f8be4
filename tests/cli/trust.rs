//! Who may change what a trusted job reads: a service for several users, tried as an attacker would.

use super::*;

/// A service of root's. `agent` and `job` run a command as two users who may both open its
/// socket; `outside` and `inside` are the variables of a hook whose job is for a change from outside, or is not.
const SERVICE: &str = r#"
    mount -t tmpfs none /run
    as() {
      local uid="$1" home="$2"; shift 2
      (cd "$home" && exec env -u XDG_CONFIG_HOME HOME="$home" setpriv --reuid "$uid" --regid 65534 --clear-groups "$@")
    }
    agent() { as 1 "$WORK/agent" "$@"; }
    job() { as 65534 "$WORK/job" "$@"; }
    inside="env BUILDKITE=true BUILDKITE_PULL_REQUEST=false BUILDKITE_BRANCH=main"
    outside="env BUILDKITE=true BUILDKITE_PULL_REQUEST=7 BUILDKITE_REPO=git@h:a/b BUILDKITE_PULL_REQUEST_REPO=git@h:evil/b"
    refused() { if "$@" 2> "$WORK/err"; then echo "done: $*"; exit 1; fi; sed 's/^forkvol: //; s/;.*//' "$WORK/err"; }
    mkdir -m 1777 "$WORK/tmp"
    export TMPDIR="$WORK/tmp"
    mkdir /run/forkvol
    FORKVOL_STORE="$WORK/store" forkvol daemon run --socket /run/forkvol/forkvol.sock --group nogroup 2> "$WORK/daemon.err" &
    daemon=$!
    trap 'kill $daemon; wait $daemon || exit 3' EXIT
    for n in $(seq 500); do [ -S /run/forkvol/forkvol.sock ] && break; sleep 0.02; done
"#;

fn service(trust: &str, script: &str) -> String {
    let work = Work::new();
    fs::create_dir_all(work.at("config/forkvol")).unwrap();
    fs::write(work.at("config/forkvol/config.toml"), trust).unwrap();
    work.home("agent", 1);
    work.home("job", 65_534);
    let mut command = work.script(&format!("{SERVICE}\n{script}"));
    printed(command.env("XDG_CONFIG_HOME", work.at("config")))
}

const POLICY: &str = "[trust]\nagents = [\"daemon\"]\nread = [\"shop\"]\n";

/// What a trusted job left in two volumes, of which others may read one.
const SEED: &str = r#"
    for volume in shop secret; do
      agent $inside forkvol --quiet run -v $volume -p cache -- bash -c "echo good > cache/f"
    done
"#;

#[test]
fn an_untrusted_job_reads_what_it_may_and_commits_nothing() {
    let out = service(
        POLICY,
        &format!(
            r#"{SEED}
            agent $outside forkvol --quiet run -v shop -p cache -- bash -c 'cat cache/f; echo evil > cache/f'
            agent $outside forkvol --quiet attach --job 1 -v shop -p cache --env-file env
            agent cat env | grep -E '^FORKVOL_(TRUST|COMMIT_SHOP)'
            agent forkvol --quiet finish --job 1 --status 0
            agent $outside forkvol --quiet attach --job 2 -v secret -p none --env-file env 2> "$WORK/err"
            agent grep '^FORKVOL_TRUST' env
            agent forkvol --quiet finish --job 2 --status 0
            refused agent $outside forkvol --quiet fork secret m
            agent $inside forkvol --quiet run -v shop -p cache -- cat cache/f
            forkvol volume show shop --json | grep -o '"head":1'"#
        ),
    );
    assert_eq!(
        out,
        "good\nFORKVOL_TRUST='untrusted'\nFORKVOL_COMMIT_SHOP='no: an untrusted job commits nothing'\n\
         FORKVOL_TRUST='untrusted'\nan untrusted job may not read secret\ngood\n\"head\":1\n"
    );
}

#[test]
fn a_job_that_calls_the_daemon_itself_is_not_believed() {
    let out = service(
        POLICY,
        &format!(
            r#"{SEED}
            job $inside forkvol --quiet run -v shop -p cache --owner caller -- bash -c 'echo evil > cache/f'
            job forkvol --quiet fork shop m --foreign false --protected true > $WORK/id
            refused job forkvol commit $(cat $WORK/id)
            refused job forkvol commit --force $(cat $WORK/id)
            refused job forkvol cat secret:f
            refused job forkvol ls secret
            refused job forkvol diff secret@1 shop
            refused job forkvol export -o x secret
            job forkvol cat shop:f
            for verb in "volume rm shop" "volume rename shop x" "volume reset shop" "rollback shop 1" "pin shop" "unpin shop" \
                "gc" "check" "check --repair" "daemon stop --force"; do
              refused job forkvol $verb
            done
            job tar -cf x.tar --files-from=/dev/null
            refused job forkvol import shop x.tar
            agent $inside forkvol --quiet fork shop mine > $WORK/theirs
            refused job forkvol commit $(cat $WORK/theirs)
            refused job forkvol abandon $(cat $WORK/theirs)
            agent forkvol --quiet abandon $(cat $WORK/theirs) > $WORK/gone
            forkvol cat shop:f"#
        ),
    );
    let lines: Vec<&str> = out.lines().collect();
    assert!(
        lines[0].contains("commits nothing") && lines[1].contains("commits nothing"),
        "{out}"
    );
    assert!(
        lines[2..6]
            .iter()
            .all(|l| l.contains("may not read secret")),
        "{out}"
    );
    assert_eq!(lines[6], "good");
    assert!(
        lines[7..18]
            .iter()
            .all(|l| l.contains("user 65534 does not own the store")),
        "{out}"
    );
    assert!(
        lines[18..20]
            .iter()
            .all(|l| l.contains("belongs to user 1")),
        "{out}"
    );
    assert_eq!(lines[20..], ["good"], "{out}");
}

#[test]
fn an_untrusted_scope_is_kept_apart_and_within_its_limit() {
    let out = service(
        &format!("{POLICY}commit = \"scope\"\nlimit = \"64k\"\n"),
        &format!(
            r#"{SEED}
            agent $outside forkvol --quiet run -v shop -p cache -- bash -c 'cat cache/f; echo evil > cache/f'
            agent $outside forkvol --quiet run -v shop -p cache -- cat cache/f
            agent $inside forkvol --quiet run -v shop -p cache -- cat cache/f
            forkvol volumes --json | grep -o '"name":"[^"]*"'
            refused agent $inside forkvol fork shop/untrusted/pr-7 m
            refused agent $inside forkvol fork x m --from shop/untrusted/pr-7
            refused agent $inside forkvol fork x m --parent shop/untrusted/pr-7@1
            refused job forkvol fork shop m --from shop/untrusted/pr-7
            job forkvol --quiet run -v shop -p cache --owner caller -- bash -c 'cat cache/f; echo mine > cache/f'
            job forkvol cat shop/untrusted/uid/65534:f
            for n in 1 2 3; do
              agent $outside forkvol run -v shop -p cache -- bash -c 'head -c 40000 /dev/urandom > cache/big' 2> $WORK/err
            done
            grep -o 'the volumes of untrusted jobs take' $WORK/err
            forkvol cat shop:f"#
        ),
    );
    let expected = "good\nevil\ngood\n\"name\":\"secret\"\n\"name\":\"shop\"\n\"name\":\"shop/untrusted/pr-7\"\n\
        shop/untrusted/pr-7 holds what untrusted jobs wrote: no fork is made of it\n\
        shop/untrusted/pr-7 holds what untrusted jobs wrote: no fork is made of it\n\
        shop/untrusted/pr-7@1 holds what untrusted jobs wrote: no fork is made of it\n\
        an untrusted job may not read shop/untrusted/pr-7\ngood\nmine\n\
        the volumes of untrusted jobs take\ngood\n";
    assert_eq!(out, expected);
}

#[test]
fn the_scope_of_a_user_cannot_be_claimed_by_the_name_of_a_branch() {
    let out = service(
        &format!("{POLICY}commit = \"scope\"\n"),
        &format!(
            r#"{SEED}
            write='cat cache/f; echo evil > cache/f'
            # Before its user's first job, and behind it.
            for name in uid-65534 uid/65534 65534 uid shop/untrusted/uid/65534; do
              agent forkvol --quiet run -v shop -p cache --foreign true --scope $name -- bash -c "$write"
            done > $WORK/attack
            job forkvol --quiet run -v shop -p cache --owner caller -- bash -c 'cat cache/f; echo mine > cache/f'
            for name in uid-65534 uid/65534; do
              agent forkvol --quiet run -v shop -p cache --foreign true --scope $name -- bash -c "$write"
            done >> $WORK/attack
            ! grep mine $WORK/attack
            job forkvol --quiet run -v shop -p cache --owner caller -- cat cache/f
            job forkvol cat shop/untrusted/uid/65534:f
            # Nor may a user look into what another one, or a branch, has.
            refused job forkvol cat shop/untrusted/uid/6553:f
            refused job forkvol cat shop/untrusted/uid-65534:f
            refused job forkvol fork shop m --from shop/untrusted/uid/65534"#
        ),
    );
    assert_eq!(
        out,
        "good\nmine\nmine\nuser 65534 may not read shop/untrusted/uid/6553\n\
         user 65534 may not read shop/untrusted/uid-65534\n\
         an untrusted job may not read shop/untrusted/uid/65534\n"
    );
}

#[test]
fn a_container_with_the_socket_has_the_rights_of_a_job_and_one_without_has_none() {
    let out = service(
        POLICY,
        &format!(
            r#"{SEED}
            contained() {{ unshare --pid --fork --mount-proc "$@"; }}
            refused contained forkvol gc
            refused contained forkvol volume rm shop --force
            refused contained forkvol cat secret:f
            contained $inside forkvol --quiet run -v shop -p $WORK/c -- bash -c "echo evil > $WORK/c/f"
            as 1 $WORK/agent $inside forkvol attach --job 1 -v shop -p cache
            unshare --mount bash -c "mount -t tmpfs none /run; setpriv --reuid 1 --regid 65534 --clear-groups bash -c 'echo work > $WORK/agent/cache/g'; ! test -e /run/forkvol"
            agent forkvol finish --job 1 --status 0
            forkvol ls shop | awk '{{print $NF}}'
            forkvol cat shop:f"#
        )
        .replace("attach --job 1 -v shop -p cache", "attach --job 1 -v shop -p cache --env-file env"),
    );
    let lines: Vec<&str> = out.lines().collect();
    assert!(
        lines[..2]
            .iter()
            .all(|l| l.contains("from inside a container")),
        "{out}"
    );
    assert!(lines[2].contains("may not read secret"), "{out}");
    assert_eq!(lines[lines.len() - 3..], ["f", "g", "good"], "{out}");
}

#[test]
fn without_a_policy_trust_is_off_and_said() {
    let cli = Cli::new();
    let text = cli.ok(&["doctor"]);
    assert!(text.contains("trust: off"), "{text}");
    let attached = cli.json(&["attach", "--job", "1", "-v", "v", "-p", "c"]);
    assert_eq!(attached["attach"]["trust"], "off");
    cli.ok(&["finish", "--job", "1", "--status", "1"]);
}

#[test]
fn a_user_of_the_service_without_a_folder_for_mounts_is_told_to_name_one() {
    let out = service(
        "",
        r#"
        refused agent forkvol attach --strict --job 1 -v shop
        agent forkvol --quiet attach --job 1 -v shop --env-file env
        agent grep -o '^FORKVOL_COMMIT_SHOP=.no: there is no folder' env
        agent forkvol finish --job 1 --status 0
        agent forkvol --quiet attach --strict --job 2 -v shop --mount-root mounts --env-file env
        agent grep -o 'mounts/2/shop' env | head -1
        agent forkvol finish --job 2 --status 0
        # Where each path is a mount of its own none is needed.
        agent forkvol --quiet attach --strict --job 3 -v shop -p cache --env-file env
        agent forkvol finish --job 3 --status 0"#,
    );
    assert_eq!(
        out,
        "there is no folder for the fork's mount: no XDG_RUNTIME_DIR, no /run/user/1, and the store is not yours: the service's store (/run/forkvol/forkvol.sock)\n\
         FORKVOL_COMMIT_SHOP='no: there is no folder\nmounts/2/shop\n"
    );
}

#[test]
fn a_branch_that_is_called_like_a_request_has_a_scope_of_its_own() {
    let out = service(
        &format!("{POLICY}commit = \"scope\"\nprotected-only = true\n"),
        &format!(
            r#"{}
            agent $protected forkvol --quiet run -v shop -p cache -- bash -c "echo good > cache/f"
            agent $outside forkvol --quiet run -v shop -p cache -- bash -c "echo request > cache/f"
            for name in pr-7 7 untrusted/pr-7 branch-pr-7; do
              branch="env BUILDKITE=true BUILDKITE_PULL_REQUEST=false BUILDKITE_BRANCH=$name"
              agent $branch forkvol --quiet run -v shop -p cache -- bash -c 'cat cache/f; echo branch > cache/f'
            done
            forkvol volumes --json | grep -o '"name":"shop/[^"]*"'
            forkvol cat shop/untrusted/pr-7:f"#,
            r#"protected="env GITLAB_CI=true CI_COMMIT_REF_PROTECTED=true CI_COMMIT_REF_NAME=main""#
        ),
    );
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[..4], ["good"; 4], "{out}");
    assert_eq!(
        lines
            .iter()
            .filter(|line| line.starts_with("\"name\""))
            .count(),
        5,
        "{out}"
    );
    assert_eq!(lines.last(), Some(&"request"), "{out}");
}

#[test]
fn only_who_is_trusted_alike_shares_a_workspace() {
    let out = service(
        &format!("{POLICY}commit = \"scope\"\n"),
        r#"
        cd "$WORK"
        join() { step="$1"; shift; "$@" forkvol --quiet attach --strict --mount-root mounts --join w --job $step -v shop -p $step --env-file env; }
        join a $inside
        join b $inside
        refused join c $outside
        forkvol finish --join w --status 0
        join d $outside
        refused join e $inside
        refused join f env ${outside#env} BUILDKITE_PULL_REQUEST=8
        join g $outside
        grep -c FORKVOL_TRUST=.untrusted env
        forkvol finish --join w --status 0"#,
    );
    assert_eq!(
        out,
        "the workspace w is trusted, and this job untrusted\n\
         the workspace w is untrusted, and this job trusted\n\
         the workspace w is that of another untrusted job\n1\n"
    );
}

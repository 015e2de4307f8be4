//! What the command line accepts.

use super::*;

fn parse(arguments: &[&str]) -> Result<Cli, clap::Error> {
    let words: Vec<OsString> = std::iter::once(&"forkvol")
        .chain(arguments)
        .map(OsString::from)
        .collect();
    super::parse(&words).map(|(cli, _)| cli)
}

#[test]
fn clap_finds_no_fault_with_the_definition() {
    Cli::command().debug_assert();
}

#[test]
fn every_command_of_the_contract_is_there() {
    for line in [
        "run -v npm -p ~/.npm -v cargo --commit on-change --report r.json -- make -j2",
        "run -- true",
        "attach --config .forkvol.yml --preset auto --link symlink --existing seed --commit always",
        "attach --pipeline pipeline.yml --step #2 --preset npm --preset go --lock-file a",
        "attach -v npm -p ~/.npm --preset cargo",
        "detect",
        "detect dir --json",
        "fork npm /mnt/x --parent a --parent b --read-only --ephemeral --size 20g --label a=b --acl",
        "fork npm /mnt/x --from npm@3",
        "run -v npm --read-only --commit never -- true",
        "run --report r.json -- true",
        "finish --status 3 --success 3,255",
        "finish --stale --deadline 5s --strict",
        "commit f-000000000001 --label a=1 --label b=1",
        "fork npm /mnt/x --exclude *.o --no-default-exclude --owner 1:2 --suid --dev --strict --label-file f",
        "commit f-000000000001 --keep --label k=v -m hello --if-head npm@3",
        "commit /mnt/x --if-base --force --busy wait=10s",
        "mount f-000000000001",
        "mount f-000000000001 /mnt/x",
        "abandon --orphans",
        "abandon --all",
        "abandon f-000000000001",
        "volumes --json",
        "volume show npm",
        "volume rm npm --force",
        "volume rename npm npm2",
        "volume reset npm",
        "forks",
        "log npm",
        "diff npm@1 npm@2 --stat",
        "rollback npm npm@1",
        "pin npm@1",
        "unpin npm@1",
        "export npm@1 -o -",
        "import npm -",
        "cat npm@1:a/b",
        "ls npm@1",
        "stats --prometheus",
        "gc --dry-run",
        "gc --settle",
        "check --repair --yes",
        "doctor --fix",
        "doctor --fix=store",
        "daemon run",
        "daemon start",
        "daemon status --json",
        "daemon stop --drain",
        "daemon stop --drain=10s",
        "daemon stop --force",
        "config",
        "config check",
        "version",
        "completions bash",
        "man /tmp/x",
        "--store /s --json --quiet volumes",
    ] {
        let words: Vec<&str> = line.split(' ').collect();
        if let Err(error) = parse(&words) {
            panic!("{line}: {error}");
        }
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    for line in [
        "",
        "fork",
        "fork npm",
        "fork .npm /mnt/x",
        "fork npm /mnt/x --size lots",
        "fork npm /mnt/x --label nothing",
        "commit f-1 --if-head a --if-base",
        "commit f-1 --busy maybe",
        "attach -v npm --config c.yml",
        "attach -v npm -p x --pipeline p.yml",
        "attach --config c.yml --pipeline p.yml",
        "attach --step x",
        "attach --step x -v a -p b",
        "attach --step x --config c.yml",
        "attach --lifetime step",
        "attach --lifetime step --add",
        "fork npm /mnt/x --from npm@1 --parent npm@2",
        "fork npm /mnt/x --size 0",
        "fork npm /mnt/x --label a=1 --label a=2",
        "commit f-1 --label a=1 --label a=2",
        "run -v npm --label a=1 --label a=2 -- true",
        "run --label a=b -- true",
        "run --strict -- true",
        "run --read-only -- true",
        "run --commit always -- true",
        "run -v npm --read-only --commit always -- true",
        "run -v npm --ephemeral --commit on-change -- true",
        "run -v npm --success 256 -- true",
        "attach -v npm --ephemeral --commit always",
        "finish --stale --commit always",
        "finish --stale --success 3",
        "finish --stale --keep",
        "finish --stale --job 1",
        "finish --stale --status 1",
        "finish --stale --outcome failure",
        "finish --outcome failure --success 3",
        "finish --status 3 --success 300",
        "finish --status 3 --success=-1",
        "stats --prometheus --json",
        "--json stats --prometheus",
        "abandon",
        "abandon f-1 --all",
        "run -v npm true",
        "run -v npm --",
        "run -v npm --commit sometimes -- true",
        "check --yes",
        "daemon stop --drain --force",
        "volumes --frobnicate",
    ] {
        let words: Vec<&str> = line.split(' ').filter(|w| !w.is_empty()).collect();
        assert!(parse(&words).is_err(), "{line}");
    }
}

#[test]
fn help_of_help_is_help() {
    for line in [
        "help",
        "help help",
        "help --help",
        "help fork -h",
        "help volume rm --help",
    ] {
        let words: Vec<&str> = line.split(' ').collect();
        let kind = parse(&words).unwrap_err().kind();
        assert_eq!(kind, ErrorKind::DisplayHelp, "{line}");
    }
}

#[test]
fn the_order_of_volumes_and_paths_is_known() {
    let words = [
        "forkvol", "run", "-v", "a", "-p", "/x", "-p", "/y", "-v", "b", "--", "true",
    ];
    let matches = Cli::command().try_get_matches_from(words).unwrap();
    let matches = matches.subcommand_matches("run").unwrap();
    let places = |name: &str| matches.indices_of(name).unwrap().collect::<Vec<_>>();
    let (volumes, paths) = (places("volume"), places("path"));
    assert!(
        volumes[0] < paths[0] && paths[1] < volumes[1],
        "{volumes:?} {paths:?}"
    );
}

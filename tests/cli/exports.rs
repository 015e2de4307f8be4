//! Where an export is written, and what was there before.

use super::*;

fn exported() -> (Cli, String) {
    let cli = Cli::new();
    cli.run("v", &cli.path("c"), "echo text > c/f");
    let tar = cli.call(&["export", "v"]).stdout;
    (cli, String::from_utf8(tar).unwrap())
}

#[test]
fn an_export_takes_the_place_of_a_file_alone_and_touches_none_beside_it() {
    let (cli, tar) = exported();
    fs::write(cli.path("out.partial"), "mine").unwrap();
    fs::write(cli.path("out"), "old").unwrap();
    fs::set_permissions(cli.path("out"), fs::Permissions::from_mode(0o600)).unwrap();
    std::os::unix::fs::symlink("out", cli.path("link")).unwrap();
    std::os::unix::fs::symlink("new", cli.path("dangling")).unwrap();
    for (output, file) in [("out", "out"), ("link", "out"), ("dangling", "new")] {
        cli.ok(&["export", "v", "-o", output]);
        assert_eq!(fs::read_to_string(cli.path(file)).unwrap(), tar, "{output}");
    }
    let mode = fs::metadata(cli.path("out")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    for link in ["link", "dangling"] {
        assert!(cli.path(link).is_symlink(), "{link}");
    }
    assert_eq!(fs::read(cli.path("out.partial")).unwrap(), b"mine");
}

#[test]
fn an_export_goes_through_devices_pipes_and_what_standard_output_is() {
    let (cli, tar) = exported();
    assert_eq!(
        cli.ok(&["export", "v", "-o", "/dev/stdout"]),
        tar.trim_end()
    );
    let open = |name: &str| {
        fs::File::options()
            .append(true)
            .create(true)
            .open(cli.path(name))
    };
    let mut export = cli.command(&["export", "v", "-o", "/dev/stdout"]);
    fs::write(cli.path("log"), "before\n").unwrap();
    assert!(
        export
            .stdout(open("log").unwrap())
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(
        fs::read_to_string(cli.path("log")).unwrap(),
        format!("before\n{tar}")
    );
    let script =
        "mknod full c 1 7; mkfifo pipe; cat pipe > piped & forkvol export v -o pipe && wait";
    let mut bash = Command::new("bash");
    let program = Path::new(env!("CARGO_BIN_EXE_forkvol")).parent().unwrap();
    let path = format!("{}:{}", program.display(), std::env::var("PATH").unwrap());
    let bash = bash
        .args(["-c", script])
        .env("PATH", path)
        .current_dir(cli.dir.path());
    assert!(
        bash.env("FORKVOL_STORE", cli.path("store"))
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(fs::read_to_string(cli.path("piped")).unwrap(), tar);
    let (code, line) = cli.fails(&["export", "v", "-o", "full"]);
    assert!(
        code == 1 && line.contains("cannot write full: no space left"),
        "{line}"
    );
    use std::os::unix::fs::FileTypeExt;
    let kind = |name: &str| fs::symlink_metadata(cli.path(name)).unwrap().file_type();
    assert!(kind("full").is_char_device() && kind("pipe").is_fifo());
}

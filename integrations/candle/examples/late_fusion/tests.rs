//! The whole example on little data, and the files that it reads and writes.

use std::fs::File;
use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;

use super::*;
use crate::common::outputs::TABLES;

const SMALL: [&str; 13] = [
    "late_fusion",
    "--epochs",
    "11",
    "--train",
    "60",
    "--held-out",
    "20",
    "--test",
    "40",
    "--hidden",
    "8",
    "--batch",
    "30",
];

/// Runs the example on little data, with a folder of its own for the results.
fn run(name: &str, words: &[&str]) -> (Summary, PathBuf) {
    let out = std::env::temp_dir().join(format!("gradblend-late-fusion-{}-{name}", std::process::id()));
    let out_words = ["--out", out.to_str().unwrap()];
    let args = Args::try_parse_from(SMALL.iter().chain(&out_words).chain(words)).unwrap();
    (compare(&args).unwrap(), out)
}

/// Facts of every row that hold whatever the data.
fn check(row: &Row, seeds: usize) {
    let name = &row.name;
    assert_eq!(row.accuracy.len(), seeds, "{name}");
    assert!(row.accuracy.iter().all(|accuracy| (0.0..=1.0).contains(accuracy)), "{name}: {:?}", row.accuracy);
    assert_eq!(row.weights.len(), row.modalities.len(), "{name}");
    assert!((row.weights.iter().sum::<f64>() - 1.0).abs() < 1e-6, "{name}: {:?}", row.weights);
    assert!(row.train_seconds > 0.0 && row.blend_seconds >= 0.0, "{name}");
    assert_eq!(row.ogr.is_some(), row.solved > 0, "{name}");
    let signal = row.ogr.as_ref().and_then(|ogr| ogr.signal.as_ref());
    let signals = if name.starts_with("online-gradient") { row.modalities.len() } else { 0 };
    assert!(signal.map_or(0, Vec::len) == signals && signal.into_iter().flatten().all(|s| s.is_finite()), "{name}");
    assert!(row.held <= row.solved, "{name}");
}

#[test]
fn every_method_trains_on_six_views_with_and_without_a_nuisance() {
    let json = std::env::temp_dir().join(format!("gradblend-late-fusion-{}.json", std::process::id()));
    let words =
        ["--seeds", "2", "--train-batch", "independent", "--min-fused", "0.5", "--json", json.to_str().unwrap()];
    let (summary, out) = run("all", &words);
    let names = [
        "naive",
        "uniform",
        "gradnorm",
        "mmpareto",
        "offline-loss",
        "online-loss",
        "online-gradient-epoch",
        "online-gradient-step",
        "online-gradient-cheap",
        "online-gradient-epoch:correlated",
        "online-gradient-step:correlated",
        "online-gradient-step:min-fused",
    ];
    summary.methods.iter().for_each(|row| check(row, 2));
    let modalities =
        |inputs: &[&str]| inputs.iter().chain(&["fused"]).map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let views = ["fac", "fou", "kar", "mor", "pix", "zer"];
    for (case, nuisance) in [("clean", None), ("noise", Some("noise")), ("shortcut", Some("shortcut"))] {
        let rows: Vec<&Row> = summary.methods.iter().filter(|row| row.data == case).collect();
        let inputs: Vec<&str> = views.into_iter().chain(nuisance).collect();
        let expected: Vec<String> = inputs.iter().map(|input| format!("alone:{input}")).collect();
        let got: Vec<&str> = rows.iter().map(|row| &row.name[..]).collect();
        assert_eq!(got[..inputs.len()], expected);
        assert_eq!(got[inputs.len()..], names);
        assert_eq!(rows[0].modalities, modalities(&inputs));
        // Super-epochs: one solve before training, one per super-epoch, one per step (2 batches per epoch), every 10th step.
        let solved: Vec<u64> = rows[inputs.len()..].iter().map(|row| row.solved).collect();
        assert_eq!(solved, [0, 0, 0, 0, 2, 4, 2, 44, 6, 2, 44, 44], "{case}");
    }

    let written: serde_json::Value = serde_json::from_str(&fs::read_to_string(&json).unwrap()).unwrap();
    assert_eq!(written["data"], summary.data);
    assert_eq!(written["methods"].as_array().unwrap().len(), summary.methods.len());
    assert_eq!(written["methods"][6]["name"], "naive");
    assert_eq!(written["methods"][13]["train_batch"], "independent");
    for (plot, figure) in
        [("accuracy", "Test accuracy"), ("best_single", "Figure 1.2"), ("ogr", "Figure 1.3"), ("weights", "Figure 1.6")]
    {
        let text = fs::read_to_string(out.join(plot).with_extension("svg")).unwrap();
        assert!(text.ends_with("</svg>\n") && text.contains(figure), "{plot}");
    }
    let runs = fs::read_to_string(out.join(RUNS)).unwrap();
    let mut runs = runs.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let program = runs.next().unwrap();
    assert!(["command", "commit", "machine", "date"].iter().all(|key| program[key].is_string()), "{program}");
    for row in &summary.methods {
        for (seed, accuracy) in row.accuracy.iter().enumerate() {
            let of = |run: &serde_json::Value| run["data"] == row.data[..] && run["method"] == row.name[..];
            let mut found = runs.clone().filter(|run| of(run) && run["seed"] == seed);
            assert_eq!(found.next().unwrap()["accuracy"], *accuracy);
            assert!(found.next().is_none());
        }
    }
    // At least a half, once there was a loss to prefer: until then weights are uniform.
    let floors = runs.clone().filter(|run| run["method"] == "online-gradient-step:min-fused");
    let floors = floors.map(|run| run["states"].as_array().unwrap().last().unwrap()["weights"].clone());
    let fused = |weights: &serde_json::Value| weights.as_array().unwrap().last().unwrap().as_f64().unwrap();
    let (floored, uniform): (Vec<_>, Vec<_>) = floors.partition(|weights| fused(weights) >= 0.5);
    assert!(!floored.is_empty());
    assert!(uniform.iter().all(|weights| weights.as_array().unwrap().iter().all(|w| *w == weights[0])), "{uniform:?}");
    let page = fs::read_to_string(out.join(TABLES)).unwrap();
    assert!(names.iter().all(|name| page.matches(&format!("| {name} ")).count() == 4), "{page}");
    fs::remove_dir_all(out).unwrap();
    fs::remove_file(json).unwrap();
}

#[test]
fn a_shortcut_shows_the_digit_on_training_samples_only() {
    let args = Args::try_parse_from(SMALL.iter().chain(&["--modalities", "mor"])).unwrap();
    let (source, inputs) = read(&args).unwrap();
    let cases = cases(&args, &source, &inputs, &[2]).unwrap();
    let widths: Vec<Vec<usize>> = cases.iter().map(|case| case.samples[0].widths().unwrap()).collect();
    assert_eq!(widths, [vec![6], vec![6, 32], vec![6, 10]]);
    let shown = |samples: &data::Samples| {
        let shown = samples.inputs[1].argmax(1).unwrap().to_vec1::<u32>().unwrap();
        let labels = samples.labels.to_vec1::<u32>().unwrap();
        shown.iter().zip(&labels).filter(|(a, b)| a == b).count()
    };
    let data = &cases[2].samples[0];
    assert_eq!(shown(&data.train), 60);
    // By chance a tenth of 40 and of 20.
    assert!(shown(&data.test) < 14 && shown(&data.held_out) < 10);
}

#[test]
fn the_samples_of_a_seed_are_the_same_whatever_the_nuisance() {
    let words = ["--modalities", "zer,mor", "--seeds", "2", "--first-seed", "7"];
    let (summary, out) = run("same", &words);
    assert_eq!(summary.seeds, [7, 8]);
    let of = |case, method: &str| summary.row(case, method).unwrap();
    // The initial weights of the first encoder, too.
    assert_eq!(of("clean", "alone:mor").accuracy, of("noise", "alone:mor").accuracy);
    assert_eq!(of("clean", "alone:mor").modalities, ["mor", "zer", "fused"]);
    assert_ne!(of("clean", "naive").accuracy, of("shortcut", "naive").accuracy);
    fs::remove_dir_all(out).unwrap();
    // One of the seeds by itself, and one of the cases.
    let (one, out) =
        run("one", &["--modalities", "mor,zer", "--seeds", "1", "--first-seed", "8", "--nuisance", "none"]);
    assert!(one.methods.iter().all(|row| row.data == "clean" && row.accuracy[0] == of("clean", &row.name).accuracy[1]));
    fs::remove_dir_all(out).unwrap();
}

#[test]
fn every_mixture_is_compared_with_its_best_input() {
    let (summary, out) = run("mixtures", &["--modalities", "mor,pix,zer", "--mixtures", "--seeds", "1"]);
    summary.methods.iter().for_each(|row| check(row, 1));
    let mixtures = summary.mixtures();
    let names: Vec<&str> = mixtures.iter().map(|mixture| mixture.name).collect();
    assert_eq!(names, ["mor+pix", "mor+zer", "pix+zer", "mor+pix+zer"]);
    for mixture in &mixtures {
        let alone = mixture.name.split('+').map(|input| summary.row(input, &format!("alone:{input}")).unwrap());
        let best = alone.map(|row| row.accuracy[0]).fold(0.0, f64::max);
        assert_eq!(mixture.best.accuracy[0], best, "{}", mixture.name);
        assert!(mixture.name.contains(&mixture.best.data));
    }
    let plot = fs::read_to_string(out.join("mixtures.svg")).unwrap();
    assert!(plot.contains("Figure 1.7") && names.iter().all(|name| plot.contains(name)));
    fs::remove_dir_all(out).unwrap();
}

#[test]
fn results_do_not_depend_on_threads() {
    let accuracy = |threads| {
        let (summary, out) = run(&format!("threads{threads}"), &["--seeds", "1", "--threads", threads]);
        fs::remove_dir_all(out).unwrap();
        summary.methods.into_iter().map(|row| (row.accuracy, row.weights)).collect::<Vec<_>>()
    };
    assert_eq!(accuracy("1"), accuracy("2"));
}

#[test]
fn spoken_digits_are_read_from_wav_files() {
    let folder = std::env::temp_dir().join(format!("gradblend-late-fusion-wav-{}", std::process::id()));
    let recordings = folder.join("recordings");
    fs::create_dir_all(&recordings).unwrap();
    // A tone per digit, in three lengths and for three speakers.
    for (speaker, name) in ["ann", "bob_b", "cy"].into_iter().enumerate() {
        for digit in 0..10 {
            for index in 0..4 {
                let path = recordings.join(format!("{digit}_{name}_{index}.wav"));
                let tone = |i| ((i as f32 * (digit + 1) as f32 * 0.2).sin() * 9000.0) as i16;
                let samples: Vec<i16> = (0..200 * (speaker + 1) * (index + 1)).map(tone).collect();
                fs::write(path, wav::tests::encode(&samples)).unwrap();
            }
        }
    }
    let images = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/data/digits.csv");
    let audio = folder.to_str().unwrap();
    let sizes = ["--train", "30", "--held-out", "10", "--test", "40", "--test-speakers", "2", "--seeds", "1"];
    let words = ["--audio", audio, "--images", images];
    let small = ["late_fusion", "--epochs", "2", "--hidden", "8", "--out", audio];
    let args = Args::try_parse_from(small.iter().chain(&sizes).chain(&words)).unwrap();
    let summary = compare(&args).unwrap();
    assert_eq!(summary.methods[0].modalities, ["audio", "image", "fused"]);
    assert!(summary.methods.iter().all(|row| row.data == "clean"));
    assert!(summary.data.contains("test speakers bob_b, cy unseen"), "{}", summary.data);
    fs::write(recordings.join("x_ann_0.wav"), "").unwrap();
    let error = format!("{:#}", compare(&args).err().unwrap());
    assert!(error.contains("x_ann_0.wav: the name does not start with a digit from 0 to 9"), "{error}");
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn images_are_read_as_table_programs_write_them() {
    let row = format!("{}3", "16,".repeat(64));
    let read = |text: &str| -> Vec<(Vec<f32>, usize)> {
        let images = images::parse_images(text.as_bytes()).unwrap_or_else(|error| panic!("{text:?}: {error:#}"));
        images.into_iter().map(|image| (image.pixels, image.label)).collect()
    };
    let want = vec![(vec![16.0; 64], 3); 2];
    let heading = (0..64).map(|i| format!("pixel {i},")).collect::<String>() + "label";
    for text in [
        format!("{row}\n{row}\n"),
        format!("{row}\n{row}"),
        format!("\u{feff}{row}\r\n{row}\r\n\r\n"),
        format!("\n{row}\n\n{row}\n \n"),
        format!("\u{feff}{heading}\n{row}\n{row}\n"),
        format!("{0}\n{0}\n", row.replace(',', ".0, ").replace('3', "3.0")),
        format!("{0}\r\n{0}", format!("\"{}\"", row.replace(',', "\",\""))),
        format!("\n{heading}\n{row},\r\n{row} ,\n{}\n", ",".repeat(64)),
        format!("{}\n{row}\n{row}\n", (0..65).map(|i| i.to_string()).collect::<Vec<_>>().join(",")),
        format!("{}label\n{row}\n{row}\n", (1..65).map(|i| format!("\"{i}\",")).collect::<String>()),
        format!("{}\n{row}\n{row}\n", heading.replace("pixel 7", "\"pixel 0, 7\"")),
    ] {
        assert_eq!(read(&text), want, "{text:?}");
    }
    assert_eq!(read(&row.replacen("16", "0.5", 1))[0].0[..2], [0.5, 16.0]);
}

#[test]
fn a_bad_image_names_its_line() {
    let good = format!("{}3\n", "1,".repeat(64));
    let heading = format!("{}label\n", "pixel,".repeat(64));
    for (text, expected) in [
        (good.clone() + "1,2", "line 2: expected 65 fields (64 pixels and a label), got 2"),
        (good.replace(',', ";"), "line 1: expected 65 fields (64 pixels and a label), got 1"),
        ("oops\n".to_owned() + &good, "line 1: expected 65 fields (64 pixels and a label), got 1"),
        (good.replacen('1', "\"1", 1), "line 1: expected 65 fields (64 pixels and a label), got 1"),
        (good.replacen('1', "\"\"\"1\"\"\"", 1), "line 1: field 1 is \"\\\"1\\\"\", expected 0 to 16"),
        (good.replacen('1', "16.0000001", 1), "line 1: field 1 is \"16.0000001\", expected 0 to 16"),
        (good.replace('3', "8.99999999999"), "line 1: field 65 is \"8.99999999999\", expected a digit from 0 to 9"),
        (good.replace('1', ""), "line 1: field 1 is \"\", expected 0 to 16"),
        (good.clone() + "\r\n" + &good.replacen('1', "17", 1), "line 3: field 1 is \"17\", expected 0 to 16"),
        (good.clone() + &good.replacen('1', "nan", 1), "line 2: field 1 is \"nan\", expected 0 to 16"),
        (good.clone() + &good.replacen('1', "", 1), "line 2: field 1 is \"\", expected 0 to 16"),
        (good.clone() + &good.replace('3', "10"), "line 2: field 65 is \"10\", expected a digit from 0 to 9"),
        (good.clone() + &good.replace('3', "2.5"), "line 2: field 65 is \"2.5\", expected a digit from 0 to 9"),
        (good.clone() + &heading, "line 2: field 1 is \"pixel\", expected 0 to 16"),
        (good.replacen('1', "x", 1), "line 1: field 1 is \"x\", expected 0 to 16"),
        (heading, "there is no image"),
        (String::new(), "there is no image"),
    ] {
        let error = format!("{:#}", images::parse_images(text.as_bytes()).err().unwrap());
        assert!(error.starts_with(expected), "{error}, expected {expected}");
    }
    let error = images::parse_images(&[good.as_bytes(), b"1,\xFF"].concat()).err().unwrap();
    assert_eq!(error.to_string(), "line 2: expected UTF-8");
}

#[test]
fn a_bad_view_names_its_file_and_line() {
    let folder = std::env::temp_dir().join(format!("gradblend-late-fusion-views-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let write = |view: &str, text: &str| {
        let file = File::create(views::path(&folder, view)).unwrap();
        GzEncoder::new(file, Compression::fast()).write_all(text.as_bytes()).unwrap();
    };
    let read = || views::read_views(&folder, &[("mor", "shape"), ("zer", "moments")]);
    let good = "0,1,0\n0.5,2,3\n1e3,-4,7\n";
    write("mor", "0,0\n8,3\n9,7\n");
    write("zer", good);
    let views = read().unwrap();
    assert_eq!(views.labels, [3, 7]);
    assert_eq!(views.views[1].rows, [[0.5, 2.0], [1000.0, -4.0]]);
    for (text, expected) in [
        (good.replace('7', "6"), "line 3 is not the digit that it is in the view mor"),
        (good.replace("1e3,-4,7\n", ""), "line 3 is not the digit that it is in the view mor"),
        (good.to_owned() + "1,1,1\n", "line 4 is not the digit that it is in the view mor"),
        (good.replace("-4", "nan"), "line 3: field 2 is \"nan\", expected a number"),
        (good.replace("-4", ""), "line 3: field 2 is \"\", expected a number"),
        (good.replace(",7", ",10"), "line 3: the label is \"10\", expected 0 to 9"),
        (good.replace(",7", ",x"), "line 3: the label is \"x\", expected 0 to 9"),
        (
            good.replace("-4,", ""),
            "line: 3, byte: 14): found record with 2 fields, but the previous record has 3 fields",
        ),
        ("0,1,0\n".to_owned(), "there is no digit"),
        (String::new(), "there is no digit"),
    ] {
        write("zer", &text);
        let error = format!("{:#}", read().err().unwrap());
        assert!(error.contains("mfeat-zer.csv.gz") && error.contains(expected), "{error}, expected {expected}");
    }
    fs::write(views::path(&folder, "zer"), good).unwrap();
    let error = format!("{:#}", read().err().unwrap());
    assert!(error.contains("mfeat-zer.csv.gz: invalid gzip header"), "{error}");
    write("zer", &good.repeat(1000));
    let whole = fs::read(views::path(&folder, "zer")).unwrap();
    fs::write(views::path(&folder, "zer"), &whole[..whole.len() / 2]).unwrap();
    assert!(format!("{:#}", read().err().unwrap()).contains("mfeat-zer.csv.gz"));
    fs::remove_dir_all(folder).unwrap();
}

/// The message for a command line that cannot be carried out.
fn rejected(words: &[&str]) -> String {
    let args = Args::try_parse_from(["late_fusion"].iter().chain(words));
    args.map_or_else(|error| error.to_string(), |args| format!("{:#}", compare(&args).err().unwrap()))
}

#[test]
fn every_path_and_number_is_checked_before_training() {
    let folder = std::env::temp_dir().join(format!("gradblend-late-fusion-bad-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let (file, out) = (folder.join("file"), folder.join("out"));
    fs::write(&file, "kept").unwrap();
    let path = |path: PathBuf| path.to_str().unwrap().to_owned();
    let (missing, within) = (path(folder.join("nowhere/x.json")), path(file.join("x")));
    let plot = path(out.join("weights.svg"));
    let (out, file_name, folder_name) = (path(out), path(file.clone()), path(folder.clone()));
    // So long that the test would not end if training started.
    let long = ["--epochs", "100000", "--seeds", "1", "--modalities", "mor", "--out"];
    for (words, expected) in [
        (["--json", &missing], format!("cannot write {missing}")),
        (["--json", &folder_name], format!("cannot write {folder_name}")),
        (["--json", &plot], format!("--json {plot} would replace {plot}")),
        (["--train", "1951"], "--train and --held-out want 2001 samples, of which there are 2000".into()),
        (["--test", "1651"], "--test wants 1651, of which there are then 1650".into()),
        (["--modalities", "top"], "--modalities top: expected some of fac,fou,kar,mor,pix,zer".into()),
        (["--modalities", "mor"], "--modalities mor: given twice".into()),
        (["--modalities", ""], "--modalities : expected some of fac".into()),
        (["--nuisance", "noise,noise"], "--nuisance: one is given twice".into()),
        (["--data", &missing], format!("cannot read the view {missing}/mfeat-mor.csv.gz")),
    ] {
        let error = rejected(&[&long[..], &[&out], &words].concat());
        assert!(error.contains(&expected), "{words:?}: {error}");
    }
    for (out, expected) in [(&file_name, "cannot write the folder"), (&within, "cannot write the folder")] {
        let error = rejected(&[&long[..], &[out]].concat());
        assert!(error.contains(expected), "{error}");
    }
    for option in ["train", "held-out", "test", "batch", "hidden", "every", "epochs", "seeds", "threads"] {
        for value in ["0", "-1", "x", "18446744073709551615"] {
            let error = rejected(&[&format!("--{option}={value}")]);
            assert!(error.contains(&format!("invalid value '{value}' for '--{option}")), "{error}");
        }
    }
    for (option, values) in [
        ("decay", ["1", "-0.1", "nan", ""]),
        ("min-fused", ["1", "-0.1", "nan", "x"]),
        ("learning-rate", ["0", "-1", "inf", "nan"]),
        ("pixel-noise", ["-1", "inf", "nan", "1e9"]),
        ("noise", ["-1", "inf", "nan", "1e9"]),
        ("first-seed", ["-1", "x", "4294967296", ""]),
        ("test-speakers", ["-1", "x", "1.5", ""]),
    ] {
        for value in values {
            let error = rejected(&[&format!("--{option}={value}")]);
            assert!(
                error.contains(&format!("value '{value}' for '--{option}")) || error.contains("a value is required"),
                "{error}"
            );
        }
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "kept");
    // Images that the results would replace, found when all else was right.
    let images = path(folder.join("images.csv"));
    fs::copy(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/data/digits.csv"), &images).unwrap();
    let audio = path(folder.join("audio"));
    fs::create_dir(&audio).unwrap();
    for name in ["0_a_0", "0_b_0", "0_c_0", "._0_a_0"] {
        fs::write(format!("{audio}/{name}.wav"), wav::tests::encode(&[1; 300])).unwrap();
    }
    let sizes = ["--train=1", "--held-out=1", "--test=1", "--test-speakers=1", "--images", &images, "--audio", &audio];
    let words = [&["--epochs", "100000", "--out", &out], &sizes[..]];
    let error = rejected(&[&words.concat()[..], &["--json", &images]].concat());
    assert_eq!(error, format!("--json {images} would replace {images}"));
    assert!(fs::read_to_string(&images).unwrap().lines().count() > 1000);
    fs::remove_dir_all(folder).unwrap();
}

"""Figures are handed over one by one, and those that cannot be are marked."""

from experiments.device_check.figures import OVER, Figures, read_lines


def test_figures_are_in_the_file_as_soon_as_they_are_there_and_a_line_cut_short_is_left_out(tmp_path):
  file = tmp_path / 'lines.jsonl'
  figures = Figures(str(file))
  figures.add('copy', 2.0, 'GB/s', peer='data sheet', peer_value=4.0)
  figures.note('nothing else')
  figures.compiled(1.0)
  figures.compiled(2.0)
  with file.open('a', encoding='utf-8') as open_file:
    open_file.write('{"row": {"na')
  found = read_lines(file)
  assert [(row['name'], row['ratio']) for row in found['rows']] == [('copy', 0.5)]
  assert found['notes'] == ['nothing else'] and found['compile_s'] == 3.0 and found['passed_over'] is None


def test_a_figure_above_its_bound_is_marked(tmp_path):
  figures = Figures(str(tmp_path / 'lines.jsonl'))
  assert OVER in figures.add('read', 1.0, 'GB/s', floor_share=1.5)['note']
  assert 'note' not in figures.add('read', 1.0, 'GB/s', floor_share=0.9)


def test_a_failure_is_kept_and_told(tmp_path, capsys):
  figures = Figures(str(tmp_path / 'lines.jsonl'))
  figures.fail('wrong')
  assert figures.failures == ['wrong'] and 'FAILED wrong' in capsys.readouterr().err
  assert read_lines(tmp_path / 'lines.jsonl')['failures'] == ['wrong']
